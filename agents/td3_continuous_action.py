# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Twin delayed deep deterministic policy gradient (TD3), continuous actions. Fujimoto et al. 2018, arXiv 1802.09477

    python agents/td3_continuous_action.py --env-id HalfCheetah-v4 --seed 1

Differs from the paper in
- several environments share the replay buffer: their steps alternate with the updates that they owe, one for each;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of every loss;
- as in the authors' later code, batches of 256 instead of 100, a learning rate of 3e-4 instead of 1e-3, two layers of
  256 units instead of 400 and 300, and 25,000 random first steps instead of 10,000 (on some tasks 1,000).
"""

import argparse
import difflib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections import deque
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
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
    total_timesteps: int = 1_000_000  # environment steps to train for, counted over all environments
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:N
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"  # how the functions are run
    eval_episodes: int = 20  # whole games played after training for the final score; 0 leaves the evaluation out
    run_dir: str | None = None  # folder for all that the run leaves behind; None makes one below runs/
    checkpoint_minutes: float = 5.0  # minutes between two checkpoints; one is written before training, one after it
    checkpoint_buffer: Literal["auto", "always", "never"] = "auto"  # save the replay buffer, too; auto: up to 1 GiB
    resume: str | None = None  # go on with the run in this folder, under its settings unless other flags say otherwise
    evaluate: str | None = None  # only evaluate the checkpoint in this run folder, without training
    video: bool = False  # also play one episode after the evaluation; episode.gif has its first 1,000 steps
    track: bool = False  # mirror the curves to Weights & Biases (needs the package wandb)

    # ---- Environment ----
    env_id: str = "HalfCheetah-v4"  # name of the environment in envpool
    num_envs: int = 8  # environments stepped together

    # ---- Algorithm ----
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    learning_starts: int = 25_000  # environment steps before the first update
    utd: float = 1.0  # updates to data: how many updates follow each environment step, a fraction of small numbers
    batch_size: int = 256  # transitions of one update
    learning_rate: float = 3e-4  # Adam's learning rate at the start
    anneal_lr: bool = False  # lower the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor
    policy_frequency: int = 2  # critic updates for one update of the policy and of the target networks
    tau: float = 0.005  # how far an update of a target network moves it towards the network: 1 makes it a copy
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions in training, which span -1 to 1
    policy_noise: float = 0.2  # standard deviation of the noise on the target policy's actions
    noise_clip: float = 0.5  # largest noise on the target policy's actions

    # ---- Speed ----
    torch_threads: int = 0  # CPU threads of torch; 0 leaves the number to torch
    env_threads: int = 0  # CPU threads of envpool; 0 leaves the number to envpool
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "tf32"  # auto is bf16 where it is fast; tf32 on a CPU is fp32

    def __post_init__(self):
        """Refuse what cannot be meant: tyro prints the sentence of a ValueError and exits with status 2."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some that are counted cannot start
        may_be_0 = {"seed", "eval_episodes", "learning_starts", "torch_threads", "env_threads"}
        most = {"buffer_size": 2**40, "utd": 1000, "gamma": 1, "tau": 1, "torch_threads": 1024, "env_threads": 1024}
        for name, value in vars(self).items():
            low, high = int(type(value) is int and name not in may_be_0), most.get(name, 2**53)
            low = 0.01 if name == "utd" else low
            if type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
        ratio = Fraction(self.utd).limit_denominator(100)
        # steps of every environment in one iteration: the fewest that owe a whole number of the policy's updates
        self.num_steps = (self.num_envs * ratio / self.policy_frequency).denominator
        self.iteration_steps = self.num_envs * self.num_steps
        self.num_updates = int(self.iteration_steps * ratio)
        begins = (self.total_timesteps // self.iteration_steps - 1) * self.iteration_steps  # the last iteration
        if begins < max(self.learning_starts, 1):
            raise ValueError(f"--total-timesteps {self.total_timesteps}, --learning-starts {self.learning_starts}: "
                             f"nothing would be learnt; the last iteration ({self.iteration_steps} steps) must begin "
                             "after the first one, and not before learning starts")  # fmt: skip
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


def leaves(tree) -> list:
    """The entries of nested dictionaries, in order; not `privileged_state`, which a real robot could not measure."""
    if not isinstance(tree, dict | gymnasium.spaces.Dict):
        return [tree]
    return [leaf for name in tree.keys() if name != "privileged_state" for leaf in leaves(tree[name])]


class FlatObservations(gymnasium.vector.VectorObservationWrapper):
    """Environments whose observations are dictionaries: all their entries one after another, [num_envs, features]."""

    def __init__(self, envs):
        super().__init__(envs)
        size = sum(math.prod(space.shape) for space in leaves(envs.single_observation_space))
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def observations(self, observations):
        return np.concatenate([x.reshape(self.num_envs, -1) for x in leaves(observations)], axis=1)


def make_envs(args: Args, num_envs: int, seed: int, **extra):
    """A gymnasium vector environment: observations [num_envs, features], real actions; env i has seed + i.

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
        envs = envpool.make(args.env_id, "gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **extra)
        return FlatObservations(envs) if isinstance(envs.single_observation_space, gymnasium.spaces.Dict) else envs


def check_envs(args: Args, envs) -> None:
    """Refuse environments that this agent cannot play."""
    obs, actions, reset = envs.single_observation_space, envs.single_action_space, envs.metadata.get("autoreset_mode")
    vectors = isinstance(obs, gymnasium.spaces.Box) and len(obs.shape) == 1
    real = isinstance(actions, gymnasium.spaces.Box) and actions.dtype.kind == "f" and len(actions.shape) == 1
    if not vectors or not real or reset != gymnasium.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {args.env_id}: this agent needs vectors as observations, vectors of real numbers as "
                        "actions and next-step autoreset, as in HalfCheetah-v4; there are "
                        f"{obs}, {actions}, {reset}")  # fmt: skip
    if not np.isfinite([actions.low, actions.high]).all():
        raise UserError(f"--env-id {args.env_id}: this agent needs bounds of the actions; there are {actions}")


def check_video(args: Args) -> None:
    """Refuse --video where it cannot be drawn: without an OpenGL driver, MuJoCo ends the process that tries."""
    draw = f"envs = envpool.make({args.env_id!r}, 'gymnasium', render_mode='rgb_array'); envs.reset(); envs.render()"
    with tempfile.TemporaryDirectory() as folder:  # for MuJoCo's log
        probe = subprocess.run([sys.executable, "-c", f"import envpool; {draw}"], cwd=folder, capture_output=True)
    if probe.returncode:
        raise UserError(f"--video: {args.env_id} cannot be drawn on this machine; MuJoCo needs an OpenGL driver, and "
                        "where there is one, LD_PRELOAD=libEGL.so.1 in the environment of this command")  # fmt: skip


class Actor(nn.Module):
    """A deterministic policy: two hidden layers under a head that tanh keeps within [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, bf16: bool):
        super().__init__()
        self.bf16 = bf16
        self.first, self.second = nn.Linear(obs_dim, 256), nn.Linear(256, 256)
        self.head = nn.Linear(256, action_dim)

    def forward(self, obs):
        """Actions [batch, action_dim] within [-1, 1] for obs [batch, features] of any number type."""
        x = self.first(obs.float()).relu()
        with torch.autocast(obs.device.type, torch.bfloat16, self.bf16, cache_enabled=False):
            x = self.second(x).relu().float()  # the other layers are always float32
        return self.head(x).tanh()


class Critics(nn.Module):
    """Two Q-functions of two hidden layers each, side by side in batched matrices [2, inputs, outputs]."""

    def __init__(self, obs_dim: int, action_dim: int, bf16: bool):
        super().__init__()
        self.bf16 = bf16
        sizes = obs_dim + action_dim, 256, 256, 1
        pairs = [(nn.Linear(*shape), nn.Linear(*shape)) for shape in zip(sizes, sizes[1:])]
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach().T for layer in pair]) for pair in pairs)
        self.biases = nn.ParameterList(torch.stack([layer.bias.detach()[None] for layer in pair]) for pair in pairs)

    def forward(self, obs, actions):
        """Q-values [2, batch] for obs [batch, features] and actions [batch, action_dim] within [-1, 1]."""
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        x = (x @ self.weights[0] + self.biases[0]).relu()
        with torch.autocast(obs.device.type, torch.bfloat16, self.bf16, cache_enabled=False):
            x = (x @ self.weights[1] + self.biases[1]).relu().float()  # the other layers are always float32
        return (x * self.weights[2].mT).sum(-1) + self.biases[2].squeeze(-1)  # fast: on a CPU, @ takes 12 % longer


class Agent(nn.Module):
    """The policy, the critics, and the target networks that follow them.

    low, high: the smallest and the largest action that the environment takes, [action_dim] each.
    """

    def __init__(self, obs_shape: tuple[int, ...], low: list[float], high: list[float], bf16: bool = False):
        super().__init__()
        sizes = math.prod(obs_shape), len(low), bf16
        self.actor, self.critics = Actor(*sizes), Critics(*sizes)
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("low", torch.tensor(low, dtype=torch.float64))  # exact for every environment
        self.register_buffer("high", torch.tensor(high, dtype=torch.float64))

    def scale(self, actions):
        """Actions [batch, action_dim] within [-1, 1] as the environment takes them, float64; not a number means low."""
        scaled = self.low + (self.high - self.low) * (actions + 1) / 2
        return scaled.fmax(self.low).fmin(self.high)

    def act(self, obs):
        """The environment's own actions [batch, action_dim] float64 for obs [batch, features] of any number type."""
        return self.scale(self.actor(obs))


# ---- algorithm -------------------------------------------------------------------------------------------------------


class Rollout:
    """The data of one iteration, allocated once and only ever written in place: CUDA graphs know its addresses.

    `outcomes` are rewards, terminations and dones: what the last actions led to, as obs are. numpy and envpool touch
    `host_*`, which is pinned memory where the device is a GPU. Noise has a row for each step or sampled transition.
    """

    def __init__(self, args: Args, envs, device: torch.device):
        def host(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

        T, N, actions = args.num_steps, args.num_envs, envs.single_action_space
        dtype = torch.float64 if actions.dtype == np.float64 else torch.float32
        self.host = host(N, *envs.single_observation_space.shape), host(N, *actions.shape, dtype=dtype), host(3, N)
        self.host_obs, self.host_actions, self.host_outcomes = self.host
        self.obs, self.outcomes = self.host_obs.to(device), self.host_outcomes.to(device)  # on a CPU the same tensors
        self.actions = torch.zeros(N, *actions.shape, device=device)  # within [-1, 1]
        self.exploring = torch.zeros((), dtype=torch.bool, device=device)  # until learning starts
        self.noise = torch.zeros(T, N, *actions.shape, device=device)
        self.random = torch.zeros(args.num_updates * args.batch_size, dtype=torch.int64, device=device)
        self.update_noise = torch.zeros(len(self.random), *actions.shape, device=device)


class Replay(nn.Module):
    """The latest steps of all environments, on the device and allocated once: rings of rows [num_rows, num_envs, ...].

    Row t has obs[t] and actions[t], taken there; what they led to is in row t + 1: its rewards, terminations and obs.
    dones[t] is 1 where obs[t] is the last of its episode: the action there did nothing, and is no valid transition.
    """

    def __init__(self, args: Args, rollout: Rollout, device: torch.device):
        super().__init__()
        self.num_envs, self.num_rows = args.num_envs, math.ceil(args.buffer_size / args.num_envs) + 1
        columns = {"obs": rollout.obs, "actions": rollout.actions}  # [num_envs, ...], like the outcomes
        columns |= zip(("rewards", "terminations", "dones"), rollout.outcomes)
        for name, x in columns.items():
            self.register_buffer(name, torch.zeros(self.num_rows, *x.shape, dtype=x.dtype, device=device))
        self.register_buffer("row", torch.tensor(-1, device=device))  # where the newest observation is
        self.register_buffer("complete", torch.tensor(-1, device=device))  # rows to sample from: their next is there

    def store(self, obs, outcomes) -> None:
        """Begin a row: the newest obs [num_envs, ...] and the outcomes [3, num_envs] of the actions of the last row."""
        self.row.add_(1).remainder_(self.num_rows)
        self.complete.add_(1).clamp_(max=self.num_rows - 1)
        for ring, x in zip((self.obs, self.rewards, self.terminations, self.dones), (obs, *outcomes)):
            ring.index_copy_(0, self.row, x[None])

    def remember(self, actions) -> None:
        """Store the actions [num_envs, ...] taken at the newest observations."""
        self.actions.index_copy_(0, self.row, actions[None])

    def sample(self, random) -> list:
        """Any of the complete transitions, by random [batch] int64 from 0 on, each [batch, ...]: obs, actions, rewards,
        terminations, next_obs, and valid, which is 1 in transitions that count and 0 in others.
        """
        number = random % (self.complete.clamp(min=1) * self.num_envs)
        env, row = number % self.num_envs, (self.row - 1 - number // self.num_envs) % self.num_rows

        def take(ring, row):
            return ring.flatten(0, 1).index_select(0, row * self.num_envs + env)

        after = (row + 1) % self.num_rows
        result = [take(self.obs, row), take(self.actions, row), take(self.rewards, after)]
        return result + [take(self.terminations, after), take(self.obs, after), 1 - take(self.dones, row)]


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration, outside all that is compiled or captured: no graph can freeze it."""
    rollout.noise.normal_(generator=generator)
    rollout.update_noise.normal_(generator=generator)
    rollout.random.random_(generator=generator)


def sample_actions(agent: Agent, args: Args, obs, noise, exploring):
    """Actions [num_envs, action_dim] within [-1, 1], of the policy with noise or, if `exploring`, uniformly random."""
    uniform = (noise * 0.5**0.5).erf()  # the Gaussian's distribution function, from -1 to 1
    return torch.where(exploring, uniform, (agent.actor(obs) + args.exploration_noise * noise).clamp(-1, 1))


@torch.no_grad()
def act(sample_fn, agent: Agent, args: Args, replay: Replay, rollout: Rollout, t: int) -> None:
    """Step t of acting: what the last step led to into the replay buffer, and new actions back to the host."""
    rollout.obs.copy_(rollout.host_obs, non_blocking=True)
    rollout.outcomes.copy_(rollout.host_outcomes, non_blocking=True)
    replay.store(rollout.obs, rollout.outcomes)
    rollout.actions.copy_(sample_fn(agent, args, rollout.obs, rollout.noise[t], rollout.exploring))
    replay.remember(rollout.actions)
    rollout.host_actions.copy_(agent.scale(rollout.actions), non_blocking=True)


def td3_critic_loss(agent: Agent, args: Args, obs, actions, rewards, terminations, next_obs, valid, noise):
    """The critics' loss (Fujimoto et al. 2018, algorithm 1) on a minibatch, and numbers to log.

    Every argument is [batch_size, ...]; `valid` is 1 in transitions that count and 0 in others.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over what counts
    with torch.no_grad():
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (agent.target_actor(next_obs) + smoothing).clamp(-1, 1)
        next_values = agent.target_critics(next_obs, next_actions).amin(0)
        targets = rewards + args.gamma * (1 - terminations) * next_values
    q_values = agent.critics(obs, actions)
    loss = 0.5 * ((q_values - targets).square() @ weights).sum()
    return loss, {"q_loss": loss, "q_values": (q_values @ weights).mean()}


def td3_policy_loss(agent: Agent, obs, valid):
    """The policy's loss, the value that the first critic expects of it, negated.

    Every argument is [batch_size, ...]; `valid` is 1 in transitions that count and 0 in others.
    """
    weights = valid / valid.sum().clamp(min=1)
    loss = -agent.critics(obs, agent.actor(obs))[0] @ weights
    return loss, {"policy_loss": loss}


def gradients(loss_fn, params: list, *inputs) -> tuple[list, dict]:
    """Gradients of the loss that loss_fn(*inputs) returns, one for each of `params`, and its numbers to log."""
    loss, metrics = loss_fn(*inputs)
    grads = torch.autograd.grad(loss, params)
    # a fused optimizer takes for granted that a gradient lies in memory as its parameter does
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(grads, params)]
    return grads, {name: value.detach() for name, value in metrics.items()}


def update(agent: Agent, optimizers, replay: Replay, rollout: Rollout, args: Args, gradients=gradients) -> dict:
    """The learning phase: the updates that one iteration owes; returns the means of the metrics."""
    q_params, policy_params = list(agent.critics.parameters()), list(agent.actor.parameters())
    targets = [*agent.target_critics.parameters(), *agent.target_actor.parameters()]
    q_optimizer, policy_optimizer = optimizers
    draws, logged = [*replay.sample(rollout.random), rollout.update_noise], []  # fast: for all updates at once
    for number, (*batch, noise) in enumerate(zip(*(x.split(args.batch_size) for x in draws)), start=1):
        grads, metrics = gradients(td3_critic_loss, q_params, agent, args, *batch, noise)
        for param, grad in zip(q_params, grads):
            param.grad = grad
        q_optimizer.step()
        logged.append(metrics)
        if number % args.policy_frequency:
            continue

        obs, *_, valid = batch
        grads, policy_metrics = gradients(td3_policy_loss, policy_params, agent, obs, valid)
        for param, grad in zip(policy_params, grads):
            param.grad = grad
        policy_optimizer.step()

        with torch.no_grad():  # fast: one kernel for all, not one for each
            torch._foreach_lerp_(targets, [*q_params, *policy_params], args.tau)
        metrics |= policy_metrics
    return {name: torch.stack([metrics[name] for metrics in logged if name in metrics]).mean() for name in logged[-1]}


@torch.no_grad()
def evaluate(agent: Agent, envs, stop=(), frames=None) -> list[float]:
    """True returns of one whole game in each environment, without the noise of training; none after a `stop`.

    `frames`, a list, gets the first 1,000 pictures of the first environment, as PIL images.
    """
    from PIL import Image

    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset()
    while playing.any() and not stop:
        if frames is not None and len(frames) < 1000:
            frames.append(Image.fromarray(envs.render()[0]))
        actions = agent.act(torch.as_tensor(obs, device=agent.low.device))
        actions = actions.cpu().numpy().astype(envs.single_action_space.dtype)
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


def accelerate(mode: str, agent: Agent, optimizers, replay: Replay, rollout: Rollout, args: Args) -> tuple:
    """The steps of acting, one for each row of the noise, and the learning phase."""
    sample_fn, gradients_fn = sample_actions, gradients
    if "compile" in mode:
        torch._dynamo.config.trace_autograd_ops = True  # fast: loss and gradients in one piece
        torch._inductor.config.split_reductions = False  # fast: a sum over a minibatch is one kernel of a GPU, not two
        gradients_fn = torch.compile(gradients, fullgraph=True, dynamic=False)
        if rollout.obs.is_cuda:  # on a CPU, calling a compiled policy costs more than it saves
            sample_fn = torch.compile(sample_actions, fullgraph=True, dynamic=False)
    acts = [partial(act, sample_fn, agent, args, replay, rollout, t) for t in range(args.num_steps)]
    learn = partial(update, agent, optimizers, replay, rollout, args, gradients_fn)
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


def check_memory(args: Args, needed: int, device: torch.device) -> None:
    """Refuse a replay buffer of `needed` bytes where the device has not so many free."""
    free, meminfo = math.inf, Path("/proc/meminfo")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif meminfo.exists():  # on Linux; elsewhere an allocation that fails has to do
        free = 1024 * int(dict(line.split(":") for line in meminfo.open())["MemAvailable"].split()[0])
    if needed > 0.9 * free:  # the rest is for all else
        raise UserError(f"--buffer-size {args.buffer_size}: takes {needed / 2**30:.1f} GiB, and {device} has "
                        f"{free / 2**30:.1f} GiB free")  # fmt: skip


def final_score(args: Args, agent: Agent, device: torch.device, run_dir: Path, stop=()) -> dict:
    """Evaluate, film if asked to, and return what the summary says of it."""
    scores = []
    if args.eval_episodes and not stop:
        envs = make_envs(args, args.eval_episodes, env_seed(args, "evaluation"))
        scores = evaluate(agent, envs, stop)
    if args.video and not stop:
        envs = make_envs(args, 1, env_seed(args, "film"), render_mode="rgb_array")
        evaluate(agent, envs, stop, frames := [])
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
    fastest = ("compile-cudagraphs" if cuda else "compile") if can_compile() else ("cudagraphs" if cuda else "eager")
    mode = fastest if args.mode == "auto" else args.mode
    if cuda:
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")  # in calls before capture
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be recorded on the default one
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.set_flush_denormal(True)  # fast: dead units leave Adam denormals, which a CPU is 13 times as slow with
    bf16_cpu = not cuda and torch.cpu._is_avx512_bf16_supported()  # on a GPU, networks this small gain nothing by it
    bf16 = args.precision == "bf16" or (args.precision == "auto" and bf16_cpu)
    torch.backends.fp32_precision = "tf32" if cuda and args.precision != "fp32" else "ieee"
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
        check_video(args)
    low, high = (bound.tolist() for bound in (envs.single_action_space.low, envs.single_action_space.high))
    network = {"obs_shape": envs.single_observation_space.shape, "low": low, "high": high}
    agent, generator = Agent(**network, bf16=bf16).to(device), torch.Generator(device).manual_seed(args.seed)
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that graphs see it change
    optimizers = [torch.optim.Adam(agent.critics.parameters(), lr, fused=True, capturable=cuda),
                  torch.optim.Adam(agent.actor.parameters(), lr, fused=True, capturable=cuda)]  # fmt: skip
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is not of this agent in this environment"):
            agent.load_state_dict(saved["agent"])
            if [agent.low.tolist(), agent.high.tolist()] != [low, high]:
                raise UserError("its actions have other bounds")
            for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
                optimizer.param_groups[0]["lr"] = lr
            if saved["device"] == device.type:
                generator.set_state(saved["generator"])
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    if args.evaluate:
        return summary | final_score(args, agent, device, Path(source), stop) | {"run_dir": source}
    rollout = Rollout(args, envs, device)
    refill = 0  # iterations that fill a buffer anew that no checkpoint has
    buffer_bytes = sum(x.nbytes for x in Replay(args, rollout, torch.device("meta")).buffers())
    copies = 2 if args.checkpoint_buffer == "always" and not cuda and "replay" not in saved else 1
    check_memory(args, copies * buffer_bytes, device)  # a checkpoint is another copy in the memory of the host
    replay = Replay(args, rollout, device)
    keeps = {"always": math.inf, "auto": 2**30, "never": 0}  # bytes up to which a checkpoint has it
    if "replay" in saved:
        with explained(f"{source}/checkpoint.pt: its replay buffer is not of this --buffer-size and --num-envs"):
            replay.load_state_dict(saved.pop("replay"))
        replay.dones[replay.row] = 1  # no transition leads from games that were left to those that begin now
    elif args.resume and global_step + args.iteration_steps <= args.total_timesteps:
        refill = math.ceil(min(global_step, max(args.learning_starts, 1), args.buffer_size) / args.iteration_steps)

    def learning_rate() -> float:
        return args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)

    def save():
        state = {"agent": agent.state_dict(), "optimizer": [x.state_dict() for x in optimizers]}
        state |= {"generator": generator.get_state(), "device": device.type, "returns": list(returns)}
        state |= {"learning_rate": lr.item()}
        state |= {"replay": replay.state_dict()} if buffer_bytes <= keeps[args.checkpoint_buffer] else {}
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
    notes, old, new = [], saved["learning_rate"], learning_rate()
    if source and new > 1.01 * old:
        notes.append(f"the learning rate rises from {old:.3g} to {new:.3g}, following the flags")
    steps = f"{refill * args.iteration_steps} steps, which do not count"
    notes += [f"the replay buffer was not saved: {steps}, fill it anew"] if refill else []
    for note in notes:
        tqdm.write(note, file=sys.stderr)

    # ---- the loop ----
    acts, learn = accelerate(mode, agent, optimizers, replay, rollout, args)
    host_obs, host_actions, host_outcomes = (x.numpy() for x in rollout.host)
    host_obs[:] = envs.reset()[0]
    dones = np.zeros(args.num_envs, dtype=bool)
    running = np.zeros((2, args.num_envs))  # returns and lengths of the games under way
    finished = []  # those of the games that ended since the last point of the curves
    iterations = (args.total_timesteps - global_step) // args.iteration_steps
    saved_at, compile_seconds = time.perf_counter(), 0.0
    speeds = {"sps": None, "sps_rollout": None, "sps_update": None}
    metrics, learned = {}, 0  # iterations that learned
    writer = SummaryWriter(run_dir, purge_step=global_step + 1, flush_secs=30)
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    for iteration in range(-refill, iterations):
        began = time.perf_counter()
        learning = iteration >= 0 and global_step >= max(args.learning_starts, 1)  # never from an empty buffer
        if learned <= 3:  # SPS counts from the fourth iteration that learns: those before compile and capture
            loop_start, loop_step, seconds = began, global_step, {"sps_rollout": 0.0, "sps_update": 0.0}
        lr.fill_(learning_rate())
        rollout.exploring.fill_(global_step < args.learning_starts)
        draw_noise(rollout, generator)

        clock, update_seconds = time.perf_counter(), 0.0
        for step in acts:
            step()
            wait()  # the actions have arrived in host_actions; on a GPU, the last learning phase is over, too
            if learning and step is acts[-1]:
                update_clock = time.perf_counter()
                metrics = learn()  # fast: a GPU learns while the environments step
                update_seconds = time.perf_counter() - update_clock  # on a GPU, of the launch alone
            obs, rewards, terminations, truncations, _ = envs.step(host_actions)
            rewards = rewards * ~dones  # a reset row is no step of a game, though some environments reward it
            running += rewards, ~dones
            dones = terminations | truncations
            host_obs[:] = obs
            host_outcomes[:] = rewards, terminations, dones
            if dones.any():
                finished += running[:, dones].T.tolist()
                running[:, dones] = 0
        seconds["sps_update"] += update_seconds
        seconds["sps_rollout"] += time.perf_counter() - clock - update_seconds

        learned += learning
        if iteration < 3 - refill or (learning and learned <= 3):  # acts or learn are not replayed yet
            compile_seconds += time.perf_counter() - began
        if iteration < 0:  # steps that fill the replay buffer anew count for nothing
            finished.clear()
            if stop:
                break
            continue
        global_step += args.iteration_steps
        progress.update(args.iteration_steps)
        stopping = iteration == iterations - 1 or bool(stop)
        saving = stopping or time.perf_counter() - saved_at > 60 * args.checkpoint_minutes
        if saving or iteration % max(1, args.total_timesteps // args.iteration_steps // 1000) == 0:
            scalars = {f"losses/{name}": value.item() for name, value in metrics.items()}
            seconds["sps"] = time.perf_counter() - loop_start
            speeds = {name: (global_step - loop_step) / value if value else None for name, value in seconds.items()}
            scalars |= {"charts/SPS": speeds["sps"], "charts/learning_rate": lr.item()}
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

    summary |= {"global_step": global_step, "train_return_mean": float(np.mean(returns)) if returns else None}
    speeds |= {"sps_rollout": None, "sps_update": None} if cuda else {}  # there the two overlap
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
