# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Parallelised Q-network (PQN), vector observations, discrete actions. Gallici et al. 2024, arXiv 2407.04811

    python agents/pqn.py --env-id CartPole-v1 --seed 1

Q-learning without a replay buffer and without a target network: layer normalisation keeps it stable, many environments
make its batches diverse. Differs from the authors' code (github.com/mttga/purejaxql) in
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of the loss, and no target reaches over it;
- the optimizer is Adam instead of RAdam, which torch does not have as a fused kernel for GPUs;
- weights start orthogonal, and the final score is played with the epsilon that training ends with;
- rewards are not scaled, and the settings below and the 128 units of a layer are our own, found on CartPole-v1.
"""

import argparse
import difflib
import io
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import torch.nn as nn  # other packages are imported where they are used: a trained Agent loads without them


@dataclass
class Args:
    # ---- Run ----
    seed: int = 1  # seed of the network, the sampling noise and the environments
    total_timesteps: int = 500_000  # environment steps to train for, counted over all environments
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:N
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"  # how the functions are run
    eval_episodes: int = 20  # whole games played after training for the final score; 0 leaves the evaluation out
    eval_greedy: bool = False  # score and film without sampling, noise or epsilon: by the likeliest or mean action
    run_dir: str | None = None  # folder for all that the run leaves behind; None makes one below runs/
    checkpoint_minutes: float = 5.0  # minutes between two checkpoints; one is written before training, one after it
    resume: str | None = None  # go on with the run in this folder, under its settings unless other flags say otherwise
    evaluate: str | None = None  # only evaluate the checkpoint in this run folder, without training
    video: bool = False  # also play one episode after the evaluation; episode.gif has its first 1,000 steps
    track: bool = False  # mirror the curves to Weights & Biases (needs the package wandb)

    # ---- Environment ----
    env_id: str = "CartPole-v1"  # name of the environment in envpool
    num_envs: int = 32  # environments stepped together

    # ---- Algorithm ----
    num_steps: int = 32  # steps of every environment in one rollout
    learning_rate: float = 2e-3  # Adam's learning rate at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor
    q_lambda: float = 0.95  # lambda of the Q(lambda) targets: 0 looks one step ahead, 1 to the end of the rollout
    num_minibatches: int = 4  # minibatches that one epoch splits the rollout into
    update_epochs: int = 4  # passes over the rollout in one learning phase
    start_e: float = 1.0  # probability of a random action at the start
    end_e: float = 0.05  # probability of a random action from the end of exploration on, and in the evaluation
    exploration_fraction: float = 0.3  # part of the run over which epsilon falls linearly from start_e to end_e
    max_grad_norm: float = 10.0  # largest norm of the gradient

    # ---- Speed ----
    torch_threads: int = 1  # CPU threads of torch; networks this small lose more to handing out work than they gain
    env_threads: int = 1  # CPU threads of envpool; a step of CartPole is shorter than handing it to another thread

    def __post_init__(self):
        """Refuse what cannot be meant: tyro prints the sentence of a ValueError and exits with status 2."""
        self.batch_size = self.num_envs * self.num_steps
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some that are counted cannot start
        may_be_0 = {"seed", "eval_episodes", "torch_threads", "env_threads"}
        most = {"torch_threads": 1024, "env_threads": 1024}
        most |= dict.fromkeys(("gamma", "q_lambda", "start_e", "end_e", "exploration_fraction"), 1)
        for name, value in vars(self).items():
            low, high = int(type(value) is int and name not in may_be_0), most.get(name, 2**53)
            if type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
        if self.batch_size % self.num_minibatches or self.batch_size > self.total_timesteps:
            raise ValueError(f"num_envs x num_steps = {self.batch_size}: must be a multiple of --num-minibatches "
                             f"{self.num_minibatches}, at most --total-timesteps {self.total_timesteps}")  # fmt: skip
        folders = [folder for folder in (self.resume, self.evaluate, self.run_dir) if folder is not None]
        if len(folders) > 1 or "" in folders:
            raise ValueError("--resume, --evaluate, --run-dir: give one of them, with the name of a folder")
        devices = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{n}" for n in range(gpus))]
        if self.evaluate:  # takes what this machine has
            self.device = self.device if self.device in devices else "auto"
            return
        if self.device not in devices:
            raise ValueError(f"--device {self.device}: must be one of {', '.join(devices)} on this machine")
        if "cudagraphs" in self.mode and (self.device == "cpu" or not gpus):
            raise ValueError(f"--mode {self.mode}: CUDA graphs need a CUDA device")
        if "compile" in self.mode and not can_compile():
            raise ValueError(f"--mode {self.mode}: torch.compile needs a C++ compiler (g++ or CXX) and Python.h")


def can_compile() -> bool:
    """Whether torch.compile can build its code here."""
    return Path(sysconfig.get_path("include"), "Python.h").exists() and bool(shutil.which(os.environ.get("CXX", "g++")))


class UserError(Exception):
    """What the user can put right: the program ends with this sentence, without a traceback."""


@contextmanager
def explained(sentence: str):
    """Turn an error inside into a UserError of this sentence and the error's own text."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{sentence}: {' '.join(str(error).split())[:300]}") from error


# ---- environments and network ----------------------------------------------------------------------------------------


def make_envs(args: Args, num_envs: int, seed: int, **extra):
    """A gymnasium vector environment: observations [num_envs, features], discrete actions; env i has seed + i.

    It resets by itself, in the step after the end of an episode ("next-step autoreset"): that step ignores its action
    and returns the first observation of the next episode. The observation of the ending step is the episode's last.
    envpool reports an episode that ends in its very last allowed step as truncated, not as terminated.
    """
    import envpool

    if args.env_id not in (ids := envpool.list_all_envs()):
        near = ", ".join(difflib.get_close_matches(args.env_id, ids, n=3, cutoff=0.4)) or "none"
        raise UserError(f"--env-id {args.env_id}: envpool has no such environment; nearest: {near}")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no warnings of envpool's float64 bounds
    with explained(f"--env-id {args.env_id}"):  # some families need more than envpool brings
        if envpool.make_spec(args.env_id).config.max_num_players > 1:
            raise UserError("a game of several players")
        threads = min(args.env_threads, num_envs)
        return envpool.make(args.env_id, "gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **extra)


def check_envs(args: Args, envs) -> None:
    """Refuse environments that this agent cannot play."""
    obs, actions, reset = envs.single_observation_space, envs.single_action_space, envs.metadata.get("autoreset_mode")
    vectors = isinstance(obs, gymnasium.spaces.Box) and len(obs.shape) == 1
    discrete = isinstance(actions, gymnasium.spaces.Discrete) and actions.start == 0
    if not vectors or not discrete or reset != gymnasium.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {args.env_id}: this agent needs vectors as observations, discrete actions from 0 on "
                        f"and next-step autoreset, as in CartPole-v1; there are {obs}, {actions}, {reset}")  # fmt: skip


def layer_init(layer, std=2**0.5):
    """Orthogonal weights of gain `std`, biases zero."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def epsilon_greedy(q_values, epsilon):
    """Log-probabilities of actions, [batch, num_actions]: any of them with probability epsilon, else the best one."""
    greedy = torch.zeros_like(q_values).scatter(-1, q_values.argmax(-1, keepdim=True), 1)
    return ((1 - epsilon) * greedy + epsilon / q_values.shape[-1]).log()


class Agent(nn.Module):
    """A network of two hidden layers, each normalised, under a head of Q-values."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int):
        super().__init__()
        self.network = nn.Sequential(
            layer_init(nn.Linear(math.prod(obs_shape), 128)), nn.LayerNorm(128), nn.ReLU(),
            layer_init(nn.Linear(128, 128)), nn.LayerNorm(128), nn.ReLU(),
            layer_init(nn.Linear(128, num_actions), 1),
        )  # fmt: skip
        self.register_buffer("epsilon", torch.ones(()))  # probability of a random action; main lowers it

    def forward(self, obs):
        """Q-values [batch, num_actions] for obs [batch, features] of any number type."""
        return self.network(obs.float())

    def policy(self, obs):
        """Log-probabilities [batch, num_actions] of the epsilon-greedy policy."""
        return epsilon_greedy(self(obs), self.epsilon)


# ---- algorithm -------------------------------------------------------------------------------------------------------


class Rollout:
    """The data of one iteration, allocated once and only ever written in place: CUDA graphs know its addresses.

    Rows are time, columns environments; `outcomes` are rewards, terminations and dones, and row t of each, like obs[t],
    is what actions[t - 1] led to. numpy and envpool touch `host_*`, which is pinned memory where the device is a GPU.
    """

    def __init__(self, args: Args, envs, device: torch.device):
        def host(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

        T, N, shape = args.num_steps, args.num_envs, envs.single_observation_space.shape
        self.host = host(N, *shape), host(N, dtype=torch.int32), host(3, T + 1, N)
        self.host_obs, self.host_actions, self.host_outcomes = self.host
        self.outcomes = self.host_outcomes.to(device)  # on a CPU the same tensor, and copying to it does nothing
        self.obs = torch.zeros(T + 1, N, *shape, device=device)
        self.actions = torch.zeros(T, N, dtype=torch.int64, device=device)
        self.gumbel = torch.zeros(T, N, int(envs.single_action_space.n), device=device)
        self.permutations = torch.zeros(args.update_epochs, T * N, dtype=torch.int64, device=device)


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration, outside all that is compiled or captured: no graph can freeze it."""
    rollout.gumbel.exponential_(generator=generator).log_().neg_()  # -log of an exponential variate is Gumbel
    for permutation in rollout.permutations:
        torch.randperm(len(permutation), generator=generator, out=permutation)


@torch.no_grad()
def act(policy, rollout: Rollout, t: int) -> None:
    """Step t of acting: the newest observations into the rollout, and actions for them back to the host."""
    rollout.obs[t].copy_(rollout.host_obs, non_blocking=True)
    rollout.actions[t].copy_((policy(rollout.obs[t]) + rollout.gumbel[t]).argmax(-1))  # a draw from the policy
    rollout.host_actions.copy_(rollout.actions[t], non_blocking=True)


def q_lambda(rewards, values, terminations, dones, gamma: float, q_lambda: float):
    """Q(lambda) targets G [T, N] of arguments [T + 1, N], values being max_a Q(obs, a) (Gallici et al. 2024).

        G[t] = r[t + 1] + gamma * ((1 - q_lambda) * values[t + 1] + q_lambda * G[t + 1]),  G[T] = values[T]

    A truncated episode ends with r + gamma * the value of its own last observation; a terminated one with r.
    """
    targets = rewards[1:] + gamma * values[1:] * (1 - terminations[1:])
    decay = gamma * q_lambda * (1 - dones[1:])
    targets[:-1] -= decay[:-1] * values[1:-1]
    for t in reversed(range(len(targets) - 1)):
        targets[t].addcmul_(decay[t], targets[t + 1])
    return targets


def td_loss(agent: Agent, obs, actions, targets, valid):
    """Half the mean squared error of Q(obs, actions) against the targets, over a minibatch, and numbers to log.

    Every argument is [minibatch_size, ...]; `valid` is 1 in rows that count and 0 in reset rows.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over the rows that count
    q_values = agent(obs).gather(-1, actions[:, None]).squeeze(-1)
    loss = 0.5 * (q_values - targets).square() @ weights
    return loss, {"td_loss": loss, "q_values": q_values @ weights}


def gradients(loss_fn, params: list, *inputs) -> tuple[list, dict]:
    """Gradients of the loss that loss_fn(*inputs) returns, one for each of `params`, and its numbers to log."""
    loss, metrics = loss_fn(*inputs)
    grads = torch.autograd.grad(loss, params)
    # a fused optimizer takes for granted that a gradient lies in memory as its parameter does
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(grads, params)]
    return grads, {name: value.detach() for name, value in metrics.items()}


def step_optimizer(optimizer, params: list, grads: list, max_grad_norm: float):
    """One step of the optimizer, all gradients together cut to a norm of max_grad_norm; returns the norm before."""
    for param, grad in zip(params, grads):
        param.grad = grad
    norm = nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    return norm


def update(agent: Agent, optimizer, rollout: Rollout, args: Args, gradients=gradients) -> dict:
    """The learning phase: targets, then update_epochs passes over the rollout; returns the means of the metrics."""
    rollout.obs[-1].copy_(rollout.host_obs, non_blocking=True)
    rollout.outcomes.copy_(rollout.host_outcomes, non_blocking=True)
    rewards, terminations, dones = rollout.outcomes
    with torch.no_grad():
        values = agent(rollout.obs).amax(-1)
        targets = q_lambda(rewards, values, terminations, dones, args.gamma, args.q_lambda)
    valid = 1 - dones[:-1]  # the action of a reset row did nothing
    batch = [x.flatten(0, 1) for x in (rollout.obs[:-1], rollout.actions, targets, valid)]

    params, logged = list(agent.parameters()), []
    for permutation in rollout.permutations:
        for rows in permutation.chunk(args.num_minibatches):
            grads, metrics = gradients(td_loss, params, agent, *(x[rows] for x in batch))
            metrics["grad_norm"] = step_optimizer(optimizer, params, grads, args.max_grad_norm)
            logged.append(metrics)
    return {name: torch.stack([metrics[name] for metrics in logged]).mean() for name in logged[0]}


@torch.no_grad()
def evaluate(agent: Agent, envs, generator: torch.Generator, greedy: bool, stop=(), frames=None) -> list[float]:
    """True returns of one whole game in each environment, epsilon-greedy or greedy; none after a `stop`.

    `frames`, a list, gets the first 1,000 pictures of the first environment, as PIL images.
    """
    from PIL import Image

    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset()
    while playing.any() and not stop:
        if frames is not None and len(frames) < 1000:
            frames.append(Image.fromarray(envs.render()[0]))
        q_values = agent(torch.as_tensor(obs, device=generator.device))
        gumbel = -torch.empty_like(q_values).exponential_(generator=generator).log()
        logits = q_values if greedy else epsilon_greedy(q_values, agent.epsilon) + gumbel
        actions = logits.argmax(-1).int().cpu().numpy()
        obs, rewards, terminations, truncations, _ = envs.step(actions)
        returns += rewards * playing
        playing &= ~(terminations | truncations)
    return [] if stop else returns.tolist()


# ---- speed: every mode runs the functions above ----------------------------------------------------------------------


class CudaGraph:
    """A step that runs as it is twice, is recorded as a CUDA graph in its third call, and is replayed from then on.

    Recorded are kernels and addresses: shapes must not change, no Python branch may depend on the value of a tensor,
    and what varies between calls or outlives them is read and written in place, in tensors made elsewhere. The result
    lies in memory of the graph: the next call overwrites it.
    """

    def __init__(self, step, pool):
        self.step, self.pool, self.calls, self.graph = step, pool, 0, torch.cuda.CUDAGraph()

    def __call__(self):
        self.calls += 1
        if self.calls < 3:
            return self.step()
        if self.calls == 3:
            with torch.cuda.graph(self.graph, pool=self.pool, stream=torch.cuda.current_stream()):
                self.result = self.step()
        self.graph.replay()
        return self.result


def accelerate(mode: str, agent: Agent, optimizer, rollout: Rollout, args: Args) -> tuple:
    """The steps of acting, one for each row of the rollout, and the learning phase."""
    policy_fn, gradients_fn = agent.policy, gradients
    if "compile" in mode:
        torch._dynamo.config.trace_autograd_ops = True  # fast: loss and gradients in one piece
        gradients_fn = torch.compile(gradients, fullgraph=True, dynamic=False)
        if rollout.obs.is_cuda:  # on a CPU, calling a compiled policy costs more than it saves
            policy_fn = torch.compile(agent.policy, fullgraph=True, dynamic=False)
    acts = [partial(act, policy_fn, rollout, t) for t in range(args.num_steps)]
    learn = partial(update, agent, optimizer, rollout, args, gradients_fn)
    if "cudagraphs" in mode:
        pool = torch.cuda.graph_pool_handle()  # one for all steps of acting, which are always replayed in this order
        acts, learn = [CudaGraph(step, pool) for step in acts], CudaGraph(learn, torch.cuda.graph_pool_handle())
    return acts, learn


# ---- running ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line. --resume and --evaluate take over the settings of that run; other flags win over them."""
    import tyro

    argv, flags = sys.argv[1:] if argv is None else argv, []
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", "--evaluate", dest="source")
    if source := parser.parse_known_args(argv)[0].source:
        with explained(f"--resume or --evaluate: {source} is no run of {Path(__file__).stem}"):
            config = json.loads(Path(source, "config.json").read_text())
            if config["agent"] != Path(__file__).stem:
                raise UserError(f"it is one of {config['agent']}")
            for name, value in config["args"].items():
                flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
                flags.append(flag if type(value) is bool else f"{flag}={value}")
    return tyro.cli(Args, args=[*flags, *argv], description=__doc__)


def env_seed(args: Args, purpose: Literal["training", "evaluation", "film"], global_step: int = 0) -> int:
    """Seed of the first of some environments, below 2**31: far from those of other purposes, runs and resumptions."""
    part = ("training", "evaluation", "film").index(purpose)
    return part * 2**29 + int(np.random.SeedSequence([args.seed, part, global_step]).generate_state(1)[0]) % 2**28


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever ends this process meanwhile: aside, then renamed over the old one."""
    aside = path.with_suffix(".tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; what was saved before is untouched") from None
    finally:
        aside.unlink(missing_ok=True)


def final_score(args: Args, agent: Agent, device: torch.device, run_dir: Path, stop=()) -> dict:
    """Evaluate, film if asked to, and return what the summary says of it."""
    scores, generator = [], torch.Generator(device).manual_seed(args.seed)
    if args.eval_episodes and not stop:
        envs = make_envs(args, args.eval_episodes, env_seed(args, "evaluation"))
        scores = evaluate(agent, envs, generator, args.eval_greedy, stop)
    if args.video and not stop:
        envs = make_envs(args, 1, env_seed(args, "film"), render_mode="rgb_array")
        evaluate(agent, envs, generator, args.eval_greedy, stop, frames := [])
        if frames:  # a signal can come before the first
            frames[0].save(gif := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
            write_file(run_dir / "episode.gif", gif.getbuffer())
    mean, std = (float(np.mean(scores)), float(np.std(scores))) if scores else (None, None)
    return {"eval_return_mean": mean, "eval_return_std": std, "eval_episodes": len(scores), "eval_returns": scores}


def main(args: Args, stop=()) -> dict:
    """Train, evaluate and summarise one agent; returns the content of summary.json. A `stop` that fills up ends it."""
    from filelock import FileLock  # comes with torch
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own makes Python 3.14 warn on stderr when a failure ends the process
    started, agent_name, source = time.perf_counter(), Path(__file__).stem, args.resume or args.evaluate
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(args.device if cuda and ":" in args.device else "cuda:0" if cuda else "cpu")
    fastest = ("compile-cudagraphs" if can_compile() else "cudagraphs") if cuda else "eager"
    mode = fastest if args.mode == "auto" else args.mode
    if cuda:
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # in calls before capture
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be recorded on the default one
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # fast: dead units leave Adam denormals, which a CPU is 13 times as slow with
    torch.manual_seed(args.seed)

    start = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{args.env_id}__{agent_name}__{args.seed}__{start}")
    # held until the run ends: no two processes share a folder, but this one can begin again after a failure
    lock = FileLock(run_dir.absolute() / ".lock", blocking=False, is_singleton=True)
    if args.resume and (run_dir / "checkpoint.pt").exists():
        with explained(f"--resume {run_dir}: in use, or not free"):
            lock.acquire()  # before the checkpoint is read

    # ---- build, or put a checkpoint back ----
    saved = {"global_step": 0, "wall_seconds": 0.0, "returns": [], "learning_rate": 0.0}
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is missing or damaged"):
            saved |= torch.load(Path(source, "checkpoint.pt"), map_location="cpu", weights_only=True)
    global_step, returns = saved["global_step"], deque(saved["returns"], maxlen=100)
    started -= saved["wall_seconds"]
    envs = make_envs(args, 1 if args.evaluate else args.num_envs, env_seed(args, "training", global_step))
    check_envs(args, envs)
    if args.video:
        with explained(f"--video: {args.env_id} cannot be drawn"):  # said before training, not after it
            film = make_envs(args, 1, env_seed(args, "film"), render_mode="rgb_array")
            film.reset()
            film.render()
            film.close()
    network = {"obs_shape": envs.single_observation_space.shape, "num_actions": int(envs.single_action_space.n)}
    agent, generator = Agent(**network).to(device), torch.Generator(device).manual_seed(args.seed)
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that graphs see it change
    optimizer = torch.optim.Adam(agent.parameters(), lr, fused=True, capturable=cuda)
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is not of this agent in this environment"):
            agent.load_state_dict(saved["agent"])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizer"]["state"]})
            lr = optimizer.param_groups[0]["lr"]  # loading put a copy of the tensor there: fill that one from now on
            if saved["device"] == device.type:
                generator.set_state(saved["generator"])
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    if args.evaluate:
        agent.epsilon.fill_(args.end_e)
        return summary | final_score(args, agent, device, Path(source), stop) | {"run_dir": source}
    rollout = Rollout(args, envs, device)

    def learning_rate() -> float:
        return args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)

    def epsilon() -> float:
        explored = global_step / args.total_timesteps
        return float(np.interp(explored, (0, args.exploration_fraction), (args.start_e, args.end_e)))

    def save():
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "returns": list(returns)}
        state |= {"generator": generator.get_state(), "device": device.type, "learning_rate": lr.item()}
        state |= {"global_step": global_step, "wall_seconds": time.perf_counter() - started}
        torch.save(state, content := io.BytesIO())
        write_file(run_dir / "checkpoint.pt", content.getbuffer())

    if not args.resume:
        with explained(f"--run-dir {run_dir}: in use, or not free"):
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(path.name != ".lock" for path in run_dir.iterdir()):
                raise UserError("it is not empty; to go on with a run in it, use --resume")
            lock.acquire()
    if args.track:
        with explained("--track"):
            from wandb import init

            id_file, options = run_dir / "wandb_id.txt", {"config": asdict(args), "sync_tensorboard": True}
            run_id = id_file.read_text() if id_file.exists() else None  # a resumed run goes on there, too
            run = init(project="redline", name=run_dir.name, id=run_id, resume="allow", **options)
            id_file.write_text(run.id)
    settings = asdict(replace(args, run_dir=None, resume=None, evaluate=None))  # what a resumed run takes over
    config = {"agent": agent_name, "args": settings, "network": network}
    write_file(run_dir / "config.json", json.dumps(config, indent=2).encode())
    write_file(run_dir / Path(__file__).name, Path(__file__).read_bytes())
    if not source:
        save()
    rates = ("learning rate", saved["learning_rate"], learning_rate()), ("epsilon", agent.epsilon.item(), epsilon())
    risen = [(name, old, new) for name, old, new in rates if source and new > 1.01 * old]
    notes = [f"the {name} rises from {old:.3g} to {new:.3g}, following the flags" for name, old, new in risen]
    for note in notes:
        tqdm.write(note, file=sys.stderr)

    # ---- the loop ----
    built = time.perf_counter()
    acts, learn = accelerate(mode, agent, optimizer, rollout, args)
    host_obs, host_actions, host_outcomes = (x.numpy() for x in rollout.host)
    host_obs[:] = envs.reset()[0]
    dones = np.zeros(args.num_envs, dtype=bool)
    running = np.zeros((2, args.num_envs))  # returns and lengths of the games under way
    finished = []  # those of the games that ended since the last point of the curves
    iterations = (args.total_timesteps - global_step) // args.batch_size
    saved_at, compile_seconds = time.perf_counter(), 0.0
    speeds = {"sps": None, "sps_rollout": None, "sps_update": None}
    writer = SummaryWriter(run_dir, purge_step=global_step + 1, flush_secs=30)
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    for iteration in range(iterations):
        if iteration <= 3:  # SPS counts from the fourth iteration on: those before compile and capture
            loop_start, loop_step, seconds = time.perf_counter(), global_step, {"sps_rollout": 0.0, "sps_update": 0.0}
        lr.fill_(learning_rate())
        agent.epsilon.fill_(epsilon())
        draw_noise(rollout, generator)

        clock = time.perf_counter()
        host_outcomes[:, 0] = host_outcomes[:, -1]  # row 0 is the last row of the rollout before
        for t, step in enumerate(acts):
            step()
            wait()  # the actions have arrived in host_actions
            obs, rewards, terminations, truncations, _ = envs.step(host_actions)
            rewards = rewards * ~dones  # a reset row is no step of a game, though some environments reward it
            running += rewards, ~dones
            dones = terminations | truncations
            host_obs[:] = obs
            host_outcomes[:, t + 1] = rewards, terminations, dones
            if dones.any():
                finished += running[:, dones].T.tolist()
                running[:, dones] = 0
        seconds["sps_rollout"] += time.perf_counter() - clock

        clock = time.perf_counter()
        metrics = learn()
        wait()
        seconds["sps_update"] += time.perf_counter() - clock

        global_step += args.batch_size
        progress.update(args.batch_size)
        stopping = iteration == iterations - 1 or bool(stop)
        saving = stopping or time.perf_counter() - saved_at > 60 * args.checkpoint_minutes
        if saving or iteration % max(1, args.total_timesteps // args.batch_size // 1000) == 0:
            scalars = {f"losses/{name}": value.item() for name, value in metrics.items()}
            seconds["sps"], compile_seconds = time.perf_counter() - loop_start, loop_start - built
            speeds = {name: (global_step - loop_step) / value for name, value in seconds.items()}
            scalars |= {"charts/SPS": speeds["sps"], "charts/learning_rate": lr.item()}
            scalars |= {"charts/epsilon": agent.epsilon.item()}
            if finished:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(finished, axis=0)
                returns.extend(episode_return for episode_return, _ in finished)
                finished.clear()
                progress.set_postfix_str(f"return {np.mean(returns):.1f}", refresh=False)
            if not all(map(math.isfinite, scalars.values())):
                raise FloatingPointError(f"not finite any more at step {global_step}: {scalars}; a lower "
                                         "--learning-rate may help, and checkpoint.pt is from before")  # fmt: skip
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
        if saving:
            save()
            saved_at = time.perf_counter()
        if stopping:
            break
    progress.close()
    writer.close()

    agent.epsilon.fill_(args.end_e)
    summary |= {"global_step": global_step, "train_return_mean": float(np.mean(returns)) if returns else None}
    summary |= speeds | {"compile_seconds": compile_seconds} | final_score(args, agent, device, run_dir, stop)
    summary |= {"notes": notes, "stopped_by": signal.Signals(stop[0]).name if stop else None, "run_dir": str(run_dir)}
    summary["wall_seconds"] = time.perf_counter() - started
    write_file(run_dir / "summary.json", json.dumps(summary, indent=2).encode())
    if args.track:
        run.finish()
    lock.release(force=True)
    return summary


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread has its failure told by the next add_scalar
    signals = []  # the first one ends the loop in order, a second one of its kind the process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number) or signal.signal(number, signal.SIG_DFL))
    try:
        print(json.dumps(main(parse_args(), signals)), flush=True)
    except Exception as error:
        failures = UserError, OSError, MemoryError, FloatingPointError, torch.OutOfMemoryError
        if not isinstance(error, failures) and "can't allocate memory" not in str(error):
            raise  # a bug: its traceback is worth reading
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, UserError) else 1)  # sys.exit would flush a stdout that may be closed
    sys.exit(128 + signals[0] if signals else 0)
