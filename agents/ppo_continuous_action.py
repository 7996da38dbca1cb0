# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Proximal policy optimisation (PPO) for continuous actions, as in MuJoCo. Schulman et al. 2017, arXiv 1707.06347

    python agents/ppo_continuous_action.py --env-id HalfCheetah-v4 --seed 1

Differs from the paper in
- clipped value loss and gradient, normalised advantages, orthogonal weights, Adam's epsilon 1e-5: the authors' code;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of every loss;
- observations are normalised and rewards scaled by running statistics, as in the authors' code, but here these change
  between rollouts, never within; the learning rate falls to zero, as there;
- several environments share the rollout of 2048 steps, in minibatches of 128 instead of 64: more steps a second for the
  same score.
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
    total_timesteps: int = 1_000_000  # environment steps to train for, counted over all environments
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
    env_id: str = "HalfCheetah-v4"  # name of the environment in envpool
    num_envs: int = 16  # environments stepped together

    # ---- Algorithm ----
    num_steps: int = 128  # steps of every environment in one rollout
    learning_rate: float = 3e-4  # Adam's learning rate at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 16  # minibatches that one epoch splits the rollout into
    update_epochs: int = 10  # passes over the rollout in one learning phase
    norm_adv: bool = True  # normalise the advantages within each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move before its gradient is cut
    clip_vloss: bool = True  # clip the change of the value estimate as well
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient

    # ---- Speed ----
    torch_threads: int = 1  # CPU threads of torch; networks this small lose more to handing out work than they gain
    env_threads: int = 0  # CPU threads of envpool; 0 leaves the number to envpool

    def __post_init__(self):
        """Refuse what cannot be meant: tyro prints the sentence of a ValueError and exits with status 2."""
        self.batch_size = self.num_envs * self.num_steps
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some that are counted cannot start
        may_be_0 = {"seed", "eval_episodes", "torch_threads", "env_threads"}
        most = {"gamma": 1, "gae_lambda": 1, "torch_threads": 1024, "env_threads": 1024}
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


def layer_init(layer, std=2**0.5):
    """Orthogonal weights of gain `std`, biases zero."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Moments(nn.Module):
    """Mean and variance of all rows [*shape] seen so far, in buffers: every checkpoint has them."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, rows, valid) -> None:
        """Take in rows [batch, *shape] where valid [batch] is 1, none where 0 (Chan, Golub and LeVeque 1979)."""
        number = valid.sum()
        weights = valid / number.clamp(min=1)
        mean = weights @ rows
        var = weights @ (rows - mean).square()
        self.count += number
        share, delta = number / self.count.clamp(min=1), mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var + (1 - share) * delta.square())


class Agent(nn.Module):
    """A Gaussian policy and a value function, two networks of two hidden layers each, over normalised observations.

    low, high: the smallest and the largest action that the environment takes, [action_dim] each.
    """

    def __init__(self, obs_shape: tuple[int, ...], low: list[float], high: list[float]):
        super().__init__()

        def network(outputs: int, std: float) -> nn.Module:
            return nn.Sequential(
                layer_init(nn.Linear(math.prod(obs_shape), 64)), nn.Tanh(),
                layer_init(nn.Linear(64, 64)), nn.Tanh(),
                layer_init(nn.Linear(64, outputs), std),
            )  # fmt: skip

        self.actor, self.critic = network(len(low), std=0.01), network(1, std=1)
        self.log_std = nn.Parameter(torch.zeros(len(low)))  # of the policy, the same for all observations
        self.obs_moments, self.return_moments = Moments(*obs_shape), Moments()
        self.register_buffer("low", torch.tensor(low, dtype=torch.float64))  # exact for every environment
        self.register_buffer("high", torch.tensor(high, dtype=torch.float64))

    def normalize(self, obs):
        """Observations of mean 0 and variance 1 by the running statistics, float32, clipped to +-10."""
        return ((obs.float() - self.obs_moments.mean) * (self.obs_moments.var + 1e-8).rsqrt()).clamp(-10, 10)

    def scale(self, rewards):
        """Rewards in units of the standard deviation of the running discounted return, clipped to +-10."""
        return (rewards * (self.return_moments.var + 1e-8).rsqrt()).clamp(-10, 10)

    def policy(self, obs, noise=0.0):
        """Actions for obs [batch, features] of any number type, twice: as drawn, and as the environment takes them.

        Standard normal noise [batch, action_dim] makes a draw from the policy, none its mean. Those for the
        environment, float64, lie within its bounds, and are `low` where they are not a number. That shows in the loss,
        which sees the actions as they were drawn, and so ends the run.
        """
        actions = self.actor(self.normalize(obs)) + self.log_std.exp() * noise
        return actions, actions.fmax(self.low).fmin(self.high)

    def forward(self, obs):
        """Means of the actions [batch, action_dim] and values [batch]."""
        normalized = self.normalize(obs)
        return self.actor(normalized), self.critic(normalized).squeeze(-1)


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
        space = envs.single_action_space
        dtype = torch.float64 if space.dtype == np.float64 else torch.float32
        self.host = host(N, *shape), host(N, *space.shape, dtype=dtype), host(3, T + 1, N)
        self.host_obs, self.host_actions, self.host_outcomes = self.host
        self.outcomes = self.host_outcomes.to(device)  # on a CPU the same tensor, and copying to it does nothing
        self.obs = torch.zeros(T + 1, N, *shape, device=device)
        self.actions = torch.zeros(T, N, *space.shape, device=device)  # as drawn
        self.noise = torch.zeros(T, N, *space.shape, device=device)
        self.discounted = torch.zeros(N, device=device)  # discounted return so far of the episodes under way
        self.permutations = torch.zeros(args.update_epochs, T * N, dtype=torch.int64, device=device)


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration, outside all that is compiled or captured: no graph can freeze it."""
    rollout.noise.normal_(generator=generator)
    for permutation in rollout.permutations:
        torch.randperm(len(permutation), generator=generator, out=permutation)


@torch.no_grad()
def act(policy, rollout: Rollout, t: int) -> None:
    """Step t of acting: the newest observations into the rollout, and actions for them back to the host."""
    rollout.obs[t].copy_(rollout.host_obs, non_blocking=True)
    drawn, clipped = policy(rollout.obs[t], rollout.noise[t])
    rollout.actions[t].copy_(drawn)
    rollout.host_actions.copy_(clipped, non_blocking=True)


def gae(rewards, values, terminations, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimates [T, N] of arguments [T + 1, N] (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    A truncated episode bootstraps from the value of its own last observation; a terminated one does not.
    """
    advantages = rewards[1:] + gamma * values[1:] * (1 - terminations[1:]) - values[:-1]
    decay = gamma * gae_lambda * (1 - dones[1:])
    for t in reversed(range(len(advantages) - 1)):
        advantages[t].addcmul_(decay[t], advantages[t + 1])
    return advantages


def discounted_returns(rewards, dones, before, gamma: float):
    """Discounted sums of each episode's rewards so far, [T, N]: R[t] = rewards[t + 1] + gamma (1 - dones[t]) R[t - 1].

    rewards, dones: [T + 1, N]; before: [N], R[-1] from the rollout before.
    """
    returns, decay = rewards[1:].clone(), gamma * (1 - dones[:-1])
    returns[0].addcmul_(decay[0], before)
    for t in range(1, len(returns)):
        returns[t].addcmul_(decay[t], returns[t - 1])
    return returns


def evaluate_actions(agent: Agent, obs, actions):
    """Log-densities of actions [batch, action_dim] at obs, entropies of the policy there, and values; each [batch]."""
    means, values = agent(obs)
    log_std, constant = agent.log_std, 0.5 * math.log(2 * math.pi)
    deviations = (actions - means) * (-log_std).exp()
    logprobs = -(0.5 * deviations.square() + log_std + constant).sum(-1)
    return logprobs, (log_std + 0.5 + constant).sum().expand_as(logprobs), values


def ppo_loss(agent: Agent, args: Args, obs, actions, logprobs, values, advantages, valid):
    """The clipped surrogate loss (Schulman et al. 2017, equations 7 and 9) of a minibatch, and numbers to log.

    Every argument is [minibatch_size, ...]; `valid` is 1 in rows that count and 0 in reset rows.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over the rows that count
    newlogprob, entropy, newvalue = evaluate_actions(agent, obs, actions)
    logratio, returns = newlogprob - logprobs, advantages + values
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    if args.norm_adv:
        advantages = advantages - advantages @ weights
        advantages = advantages / ((advantages.square() @ weights).sqrt() + 1e-8)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped) @ weights

    v_error = (newvalue - returns).square()
    if args.clip_vloss:
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (v_clipped - returns).square())
    value_loss, entropy = 0.5 * v_error @ weights, entropy @ weights

    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics["approx_kl"] = (ratio - 1 - logratio) @ weights  # http://joschu.net/blog/kl-approx.html
    metrics["clipfrac"] = (clipped != ratio).float() @ weights
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy, metrics


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
    """The learning phase: advantages, then update_epochs passes over the rollout; returns the means of the metrics."""
    rollout.obs[-1].copy_(rollout.host_obs, non_blocking=True)
    rollout.outcomes.copy_(rollout.host_outcomes, non_blocking=True)
    rewards, terminations, dones = rollout.outcomes
    obs, actions = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten(0, 1)
    valid = 1 - dones[:-1].flatten()  # the action of a reset row did nothing
    with torch.no_grad():  # fast: in one batch, three times as fast as values and log-probabilities step by step
        logprobs, _, b_values = evaluate_actions(agent, obs, actions)
        values = torch.cat([b_values, agent(rollout.obs[-1])[1]]).view_as(dones)
        discounted = discounted_returns(rewards, dones, rollout.discounted, args.gamma)
        rollout.discounted.copy_(discounted[-1])
        agent.return_moments.update(discounted.flatten(), valid)
        rewards = agent.scale(rewards)
        advantages = gae(rewards, values, terminations, dones, args.gamma, args.gae_lambda).flatten()

    params, logged = list(agent.parameters()), []
    for permutation in rollout.permutations:
        for rows in permutation.chunk(args.num_minibatches):
            minibatch = (x[rows] for x in (obs, actions, logprobs, b_values, advantages, valid))
            grads, metrics = gradients(ppo_loss, params, agent, args, *minibatch)
            metrics["grad_norm"] = step_optimizer(optimizer, params, grads, args.max_grad_norm)
            logged.append(metrics)
    # only now: with the statistics that its actions were chosen by, every ratio of this rollout started at one
    agent.obs_moments.update(obs, valid)
    variances = {"obs_var": agent.obs_moments.var.max(), "return_var": agent.return_moments.var}
    return {name: torch.stack([metrics[name] for metrics in logged]).mean() for name in logged[0]} | variances


@torch.no_grad()
def evaluate(agent: Agent, envs, generator: torch.Generator, greedy: bool, stop=(), frames=None) -> list[float]:
    """True returns of one whole game in each environment, by sampled actions or their means; none after a `stop`.

    `frames`, a list, gets the first 1,000 pictures of the first environment, as PIL images.
    """
    from PIL import Image

    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset()
    while playing.any() and not stop:
        if frames is not None and len(frames) < 1000:
            frames.append(Image.fromarray(envs.render()[0]))
        noise = torch.randn(envs.num_envs, *agent.low.shape, generator=generator, device=generator.device)
        _, actions = agent.policy(torch.as_tensor(obs, device=generator.device), 0.0 if greedy else noise)
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
    """Evaluate by sampled actions and by their means, film if asked to, and return what the summary says of it."""
    returns, generator = {False: [], True: []}, torch.Generator(device)
    for greedy in (args.eval_greedy, not args.eval_greedy):
        if args.eval_episodes and not stop:
            envs = make_envs(args, args.eval_episodes, env_seed(args, "evaluation"))
            returns[greedy] = evaluate(agent, envs, generator.manual_seed(args.seed), greedy, stop)
    if args.video and not stop:
        envs = make_envs(args, 1, env_seed(args, "film"), render_mode="rgb_array")
        evaluate(agent, envs, generator, args.eval_greedy, stop, frames := [])
        if frames:  # a signal can come before the first
            frames[0].save(gif := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)
            write_file(run_dir / "episode.gif", gif.getbuffer())
    mean = {greedy: float(np.mean(x)) if x else None for greedy, x in returns.items()}
    scores, summary = returns[args.eval_greedy], {"eval_return_mean": mean[args.eval_greedy]}
    summary |= {"eval_return_std": float(np.std(scores)) if scores else None}
    summary |= {"eval_sampled_return_mean": mean[False], "eval_greedy_return_mean": mean[True]}
    return summary | {"eval_episodes": len(scores), "eval_returns": scores}


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
    agent, generator = Agent(**network).to(device), torch.Generator(device).manual_seed(args.seed)
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that graphs see it change
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=True, capturable=cuda)
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is not of this agent in this environment"):
            agent.load_state_dict(saved["agent"])
            if [agent.low.tolist(), agent.high.tolist()] != [low, high]:
                raise UserError("its actions have other bounds")
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizer"]["state"]})
            lr = optimizer.param_groups[0]["lr"]  # loading put a copy of the tensor there: fill that one from now on
            if saved["device"] == device.type:
                generator.set_state(saved["generator"])
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    if args.evaluate:
        return summary | final_score(args, agent, device, Path(source), stop) | {"run_dir": source}
    rollout = Rollout(args, envs, device)

    def learning_rate() -> float:
        return args.learning_rate * (1 - global_step / args.total_timesteps if args.anneal_lr else 1)

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
    notes, old, new = [], saved["learning_rate"], learning_rate()
    if source and new > 1.01 * old:
        notes.append(f"the learning rate rises from {old:.3g} to {new:.3g}, following the flags")
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
