# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
"""Twin delayed deep deterministic policy gradient (TD3), continuous actions, as in MuJoCo. Fujimoto et al. 2018,
arXiv 1802.09477

    python agents/td3_continuous_action.py --env-id HalfCheetah-v4 --seed 1

Differs from the paper in
- several environments, each with exploration noise of its own, share the replay buffer: after each of their steps
  follow the updates that it owes, as many as for one environment, in one learning phase;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is never stored;
- batches of 256 instead of 100, and a learning rate of 3e-4 instead of 1e-3, as the authors' later code has it.
"""

import difflib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.spaces import Box
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ---- Run ----
    seed: int = 1
    """seed of the network, the sampling noise and the environments"""
    total_timesteps: int = 1_000_000
    """environment steps to train for, counted over all environments"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N"""
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"
    """how the same functions are run; auto is the fastest measured for the device"""
    eval_episodes: int = 20
    """whole games played after training for the final score; 0 leaves the evaluation out"""
    run_dir: str | None = None
    """folder for everything that the run leaves behind; None makes one, runs/<env>__<agent>__<seed>__<time>"""
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints; the first is written before training and the last after it"""
    checkpoint_buffer: bool = False
    """save the replay buffer, too; without it, a run that is resumed fills it anew before it goes on to learn"""
    resume: str | None = None
    """go on with the run in this folder, under its own settings unless other flags say otherwise"""
    evaluate: str | None = None
    """only evaluate the checkpoint in this run folder, without training"""
    video: bool = False
    """also play one episode after the evaluation and save it as episode.gif"""
    track: bool = False
    """mirror the curves to Weights & Biases (needs the package wandb)"""

    # ---- Environment ----
    env_id: str = "HalfCheetah-v4"
    """name of the environment in envpool"""
    num_envs: int = 8
    """environments stepped together"""

    # ---- Algorithm ----
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    learning_starts: int = 25_000
    """environment steps before the first update"""
    utd: float = 1.0
    """updates to data: how many updates follow each environment step, a fraction of small numbers"""
    batch_size: int = 256
    """transitions of one update"""
    learning_rate: float = 3e-4
    """Adam's learning rate at the start"""
    anneal_lr: bool = False
    """lower the learning rate linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    policy_frequency: int = 2
    """updates of the critics for one of the policy and of all target networks; compiled in one piece, so at most 20"""
    tau: float = 0.005
    """how far an update of a target network moves it towards the network: 1 makes it a copy"""
    exploration_noise: float = 0.1
    """standard deviation of the noise on the actions in training, for actions from -1 to 1"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policy's actions"""
    noise_clip: float = 0.5
    """largest noise on the target policy's actions"""

    # ---- Speed ----
    torch_threads: int = 0
    """CPU threads of torch; 0 takes what was measured best for this agent"""
    env_threads: int = 0
    """CPU threads of envpool; 0 takes what was measured best for this agent"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "fp32"
    """arithmetic of the network: auto is tf32 on CUDA, bf16 on a CPU with AVX512-BF16 and fp32 on any other"""

    @property
    def ratio(self) -> Fraction:
        """--utd as a fraction."""
        return Fraction(self.utd).limit_denominator(100)

    @property
    def num_steps(self) -> int:
        """Steps of every environment in one iteration: the fewest that owe a whole number of the policy's updates."""
        return (self.num_envs * self.ratio / self.policy_frequency).denominator

    @property
    def iteration_steps(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates in one learning phase."""
        return int(self.iteration_steps * self.ratio)

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps


MANY = 2**31 - 1
LIMITS = {  # smallest and largest value of each number
    "seed": (0, MANY), "total_timesteps": (1, 10**15), "eval_episodes": (0, MANY), "checkpoint_minutes": (0, MANY),
    "num_envs": (1, MANY), "buffer_size": (1, MANY), "learning_starts": (0, MANY), "utd": (0.01, 1000),
    "batch_size": (1, MANY), "learning_rate": (0, 1), "gamma": (0, 1), "policy_frequency": (1, 20), "tau": (0, 1),
    "exploration_noise": (0, MANY), "policy_noise": (0, MANY), "noise_clip": (0, MANY), "torch_threads": (0, 1024),
    "env_threads": (0, 1024),
}  # fmt: skip
METRICS = ("q_loss", "q_values", "q_grad_norm", "policy_loss", "policy_grad_norm")
CPU_MODE = "compile"  # of --mode auto; 1.3 times the updates of eager mode and more, and runs are long


# ---- environments ----------------------------------------------------------------------------------------------------


class EnvPool:
    """An envpool behind the `reset` and `step` of a gymnasium vector environment with next-step autoreset.

    The step after the end of an episode ignores its action and returns the first observation of the next one, with
    reward 0; the observation of the ending step itself is the episode's last.
    """

    def __init__(self, pool):
        self.pool, self.keys, self.num_envs = pool, pool._state_keys, pool.num_envs
        self.single_observation_space = pool.single_observation_space
        self.single_action_space = pool.single_action_space
        self.env_ids = np.arange(self.num_envs, dtype=np.int32)
        self.reset, self.render = pool.reset, pool.render

    def step(self, actions):
        """Take actions [num_envs, ...]; returns obs, rewards, terminations, truncations and infos, a row per env."""
        # fast: three times envpool's own `step` for 4 CartPoles; what that spends its time on are nested dictionaries
        self.pool._send([self.env_ids, self.env_ids, actions])
        infos = dict(zip(self.keys, self.pool._recv()))
        return infos["obs"], infos["reward"], infos["done"] & ~infos["trunc"], infos["trunc"], infos


def make_envs(args: Args, num_envs: int, seed: int, render: bool = False) -> EnvPool:
    """Environments with observations [num_envs, features] and actions [num_envs, action_dim]; env i has seed + i."""
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # gymnasium on envpool's float64 bounds
    spec = envpool.make_spec(args.env_id)
    if len(spec.observation_space.shape or ()) != 1 or not isinstance(spec.action_space, Box):
        fail(f"--env-id {args.env_id}: this agent needs vector observations and real actions, as in HalfCheetah-v4")
    if not np.isfinite([spec.action_space.low, spec.action_space.high]).all():
        fail(f"--env-id {args.env_id}: this agent needs bounds of the actions, and those there are infinite")
    threads = min(num_envs, args.env_threads or cpu_cores())
    extra = {"render_mode": "rgb_array"} if render else {}
    return EnvPool(
        envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **extra)
    )


def true_game(rewards, terminations, truncations, infos):
    """The game's own rewards [num_envs] and whether a game is over [num_envs], however training shapes them."""
    return rewards, terminations | truncations


# ---- network ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """A deterministic policy: two hidden layers under a head that tanh keeps within [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.hidden = nn.ModuleList([nn.Linear(obs_dim, 256), nn.Linear(256, 256)])
        self.head = nn.Linear(256, action_dim)

    def forward(self, obs):
        """Actions [batch, action_dim] within [-1, 1] for obs [batch, features] float32."""
        x = self.hidden[0](obs).relu()
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            x = self.hidden[1](x).relu().to(obs.dtype)  # the other layers stay as they are
        return self.head(x).tanh()


class Critics(nn.Module):
    """Two Q-functions of two hidden layers each, side by side in batched matrices [2, inputs, outputs]."""

    def __init__(self, obs_dim: int, action_dim: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        sizes = obs_dim + action_dim, 256, 256, 1
        pairs = [(nn.Linear(*shape), nn.Linear(*shape)) for shape in zip(sizes, sizes[1:])]
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach().T for layer in pair]) for pair in pairs)
        self.biases = nn.ParameterList(torch.stack([layer.bias.detach()[None] for layer in pair]) for pair in pairs)

    def forward(self, obs, actions, members: int = 2):
        """Q-values [members, batch] for obs [batch, features] and actions [batch, action_dim] within [-1, 1]."""
        first, hidden, head = ((bias[:members], weight[:members]) for bias, weight in zip(self.biases, self.weights))
        x = torch.cat([obs, actions], -1).expand(members, -1, -1)
        x = (x @ first[1] + first[0]).relu()
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            x = (x @ hidden[1] + hidden[0]).relu().to(obs.dtype)  # the other layers stay as they are
        return (x * head[1].mT).sum(-1) + head[0].squeeze(-1)  # fast: a matrix product for one column is a slow one


class Agent(nn.Module):
    """The policy, the critics, and the target networks that follow them."""

    def __init__(self, obs_shape: tuple[int, ...], action_dim: int, bf16: bool = False):
        super().__init__()
        sizes = math.prod(obs_shape), action_dim, bf16
        self.actor, self.critics = Actor(*sizes), Critics(*sizes)
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("exploration_noise", torch.zeros(()), persistent=False)  # main sets it, to train


# ---- algorithm -------------------------------------------------------------------------------------------------------


def action_bounds(envs, device: torch.device):
    """Lowest and highest action, each [action_dim] in the floating point type that the environments take."""
    space = envs.single_action_space
    return torch.tensor(space.low, device=device), torch.tensor(space.high, device=device)


class Rollout:
    """The data of one iteration, allocated once and only ever written in place: captured graphs know its addresses.

    Rows are time, columns environments. `host_*` are the ends that numpy and envpool touch: pinned memory where the
    device is a GPU, the very same tensors as their twins where it is the CPU.
    """

    def __init__(self, args: Args, envs, device: torch.device):
        def twins(*shape, dtype=torch.float32):
            host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
            return host, host.to(device)

        T, N = args.num_steps, args.num_envs
        obs_shape, action_shape = envs.single_observation_space.shape, envs.single_action_space.shape
        self.bounds = action_bounds(envs, device)
        # obs[t] came with dones[t]; actions[t], taken there, brought rewards[t] and terminations[t]
        self.obs = torch.zeros(T + 1, N, *obs_shape, device=device)
        self.actions = torch.zeros(T, N, *action_shape, device=device)
        self.noise = torch.zeros(T, N, *action_shape, device=device)
        self.random = torch.zeros(args.num_updates * args.batch_size, dtype=torch.int64, device=device)
        self.update_noise = torch.zeros(len(self.random), *action_shape, device=device)
        self.exploring = torch.zeros((), dtype=torch.bool, device=device)  # until learning starts
        self.host_rewards, self.rewards = twins(T, N)
        self.host_terminations, self.terminations = twins(T, N)
        self.host_dones, self.dones = twins(T + 1, N)
        self.host_obs = twins(N, *obs_shape)[0]  # the newest observations and the answer to them
        self.host_actions = twins(N, *action_shape, dtype=self.bounds[0].dtype)[0]


class Replay(nn.Module):
    """The latest `size` transitions, on the device and allocated once: rings with rows like those of the rollout.

    A ring is [size + 1, ...]: its last row is never drawn from and takes what is not to be kept.
    """

    def __init__(self, size: int, rollout: Rollout, device: torch.device):
        super().__init__()
        self.size = size
        rows = {"obs": rollout.obs, "actions": rollout.actions, "rewards": rollout.rewards}
        rows |= {"terminations": rollout.terminations, "next_obs": rollout.obs}
        for name, x in rows.items():
            self.register_buffer(name, torch.zeros(size + 1, *x.shape[2:], dtype=x.dtype, device=device))
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64, device=device))  # transitions, ever

    def rings(self) -> tuple:
        return self.obs, self.actions, self.rewards, self.terminations, self.next_obs

    def store(self, transitions, valid) -> None:
        """Add transitions, tensors [batch, ...] like the rings, where `valid` [batch] bool is true, in their order."""
        numbers = self.stored + valid.cumsum(0)
        rows = torch.where(valid, (numbers - 1) % self.size, self.size)
        for ring, values in zip(self.rings(), transitions):
            ring.index_copy_(0, rows, values)
        self.stored.copy_(numbers[-1])

    def sample(self, random) -> list:
        """Transitions, tensors [batch, ...] like the rings: any of those held, by random [batch] int64 from 0 on."""
        rows = random % self.stored.clamp(1, self.size)
        return [ring[rows] for ring in self.rings()]


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration: Gaussian noise for its actions and its updates, numbers for what those
    replay.

    Drawn here, outside everything compiled or captured, it is the same in every mode, and no graph can freeze it.
    """
    rollout.noise.normal_(generator=generator)
    rollout.update_noise.normal_(generator=generator)
    rollout.random.random_(generator=generator)


def sample_actions(agent: Agent, obs, noise, exploring, low, high):
    """Actions [num_envs, action_dim] within [-1, 1], of the policy with noise or, if `exploring`, uniformly random, and
    the same scaled to [low, high]: `low` where they are not a number, which never reaches an environment.
    """
    uniform = (noise * 0.5**0.5).erf()  # the Gaussian's distribution function, from -1 to 1
    noisy = (agent.actor(obs) + agent.exploration_noise * noise).clamp(-1, 1)
    actions = torch.where(exploring, uniform, noisy)
    return actions, (0.5 * (high + low) + 0.5 * (high - low) * actions).fmax(low).fmin(high)


@torch.no_grad()
def act_step(
    agent: Agent, host_obs, exploring, bounds, host_actions, obs, noise, actions, sample_actions=sample_actions
) -> None:
    """One step of acting: host_obs into the rollout's row `obs`, actions for it into `actions` and host_actions."""
    obs.copy_(host_obs, non_blocking=True)
    drawn, scaled = sample_actions(agent, obs, noise, exploring, *bounds)
    actions.copy_(drawn)
    host_actions.copy_(scaled, non_blocking=True)


@torch.no_grad()
def collect(replay: Replay, rollout: Rollout) -> None:
    """Bring what the environments answered onto the device, and the iteration's transitions into the replay buffer."""
    rollout.obs[-1].copy_(rollout.host_obs, non_blocking=True)
    rollout.rewards.copy_(rollout.host_rewards, non_blocking=True)
    rollout.terminations.copy_(rollout.host_terminations, non_blocking=True)
    rollout.dones.copy_(rollout.host_dones, non_blocking=True)

    obs, next_obs = rollout.obs[:-1], rollout.obs[1:]
    transitions = obs, rollout.actions, rollout.rewards, rollout.terminations, next_obs
    valid = rollout.dones[:-1] == 0  # the action of a reset row did nothing
    replay.store([x.flatten(0, 1) for x in transitions], valid.flatten())


def td3_critic_loss(agent: Agent, args: Args, obs, actions, rewards, terminations, next_obs, noise):
    """The critics' loss (Fujimoto et al. 2018, algorithm 1), half the mean squared error of each against the same
    target, over a minibatch, each argument [batch_size, ...], and its first 2 METRICS.
    """
    with torch.no_grad():
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (agent.target_actor(next_obs) + smoothing).clamp(-1, 1)
        next_values = agent.target_critics(next_obs, next_actions).amin(0)
        targets = rewards + args.gamma * (1 - terminations) * next_values
    q_values = agent.critics(obs, actions)
    loss = 0.5 * (q_values - targets).square().mean(-1).sum()
    # stacked anew: torch.compile loses the gradient of a view of what is returned detached, too (pytorch#195357)
    return loss, torch.stack([loss, q_values.mean()]).detach()


def td3_policy_loss(agent: Agent, obs):
    """The policy's loss, the value that the first critic expects of it at obs [batch_size, features], negated."""
    loss = -agent.critics(obs, agent.actor(obs), members=1).mean()
    return loss, torch.stack([loss]).detach()


def gradients(loss_fn: Callable, params: tuple, max_grad_norm: float, *inputs):
    """Of the loss that loss_fn(*inputs) returns with its metrics: the gradient for each of `params`, all together cut
    to a norm of max_grad_norm, and the metrics with the norm before the cut appended.
    """
    loss, metrics = loss_fn(*inputs)
    grads = torch.autograd.grad(loss, params)
    grad_norm = torch.stack([grad.norm() for grad in grads]).norm()
    scale = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    # each with the strides of its parameter: a fused optimizer takes the two for alike without looking
    grads = [torch.empty_like(param).copy_(grad * scale) for grad, param in zip(grads, params)]
    return grads, torch.cat([metrics, grad_norm[None]])


def step_optimizer(optimizer, params: tuple, grads) -> None:
    """One step of the optimizer for `params` alone, with a gradient for each of them."""
    for param, grad in zip(params, grads):
        param.grad = grad
    optimizer.step()
    for param in params:
        param.grad = None


def spell_out(optimizer) -> None:
    """Add what step_adam needs to the state of an Adam: for each parameter, its two betas to the power of its steps.

    ValueError for what step_adam would leave out, so that a changed optimizer trains as in eager mode or not at all.
    """
    for group in optimizer.param_groups:
        if group["weight_decay"] or group["amsgrad"] or group["maximize"]:
            raise ValueError("step_adam is Adam without weight decay, amsgrad and maximize: add there what you need")
        for param in group["params"]:
            state = optimizer.state[param]
            state["powers"] = torch.tensor(group["betas"], device=param.device) ** state["step"].to(param.device)


@torch.no_grad()
def step_adam(optimizer, params: tuple, grads) -> None:
    """step_optimizer for an Adam after spell_out, written out (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1).

    Of this torch.compile makes one loop with the clipping before it and the target network after it. The powers are
    kept, since it would raise betas to a power anew for every few elements.
    """
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for param, grad in zip(params, grads):
        state, group = optimizer.state[param], groups[param]
        (beta1, beta2), powers, mean, square = group["betas"], state["powers"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        powers *= torch.tensor([beta1, beta2])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = (1 - powers).unbind()
        param.sub_(group["lr"] / correction1 * mean / (square.sqrt() / correction2.sqrt() + group["eps"]))


@torch.no_grad()
def follow(targets: nn.Module, network: nn.Module, tau: float) -> None:
    """Move the parameters of a target network by tau towards those of the network."""
    for target, param in zip(targets.parameters(), network.parameters()):
        target.lerp_(param, tau)


def train_step(agent: Agent, optimizer, replay: Replay, random, noise, args: Args, gradients, step_optimizer):
    """policy_frequency updates of the critics, each by its share of random [policy_frequency * batch_size] and of as
    much noise [..., action_dim], then one of the policy and of all target networks; the sums of METRICS.
    """
    q_params, policy_params = tuple(agent.critics.parameters()), tuple(agent.actor.parameters())
    q_sums = 0
    for draw, smoothing in zip(random.split(args.batch_size), noise.split(args.batch_size)):
        minibatch = replay.sample(draw)
        grads, q_metrics = gradients(td3_critic_loss, q_params, math.inf, agent, args, *minibatch, smoothing)
        step_optimizer(optimizer, q_params, grads)
        q_sums = q_sums + q_metrics
    grads, policy_metrics = gradients(td3_policy_loss, policy_params, math.inf, agent, minibatch[0])
    step_optimizer(optimizer, policy_params, grads)
    follow(agent.target_actor, agent.actor, args.tau)
    follow(agent.target_critics, agent.critics, args.tau)
    return torch.cat([q_sums, policy_metrics * args.policy_frequency])  # one counts for as many as those of the critics


def update(agent: Agent, optimizer, replay: Replay, rollout: Rollout, args: Args, metrics, train_step) -> None:
    """The learning phase: the updates that an iteration owes; `metrics` gets the means of METRICS."""
    metrics.zero_()
    size = args.policy_frequency * args.batch_size
    for random, noise in zip(rollout.random.split(size), rollout.update_noise.split(size)):
        metrics += train_step(agent, optimizer, replay, random, noise, args)
    metrics /= args.num_updates


@torch.no_grad()
def evaluate(agent: Agent, envs, episodes: int, generator: torch.Generator, stop=(), frames=None) -> list[float]:
    """True returns of `episodes` whole games, played without the noise of training; fewer after a `stop`.

    Each environment plays a share of the games fixed beforehand: first come, first counted would favour short games.
    `frames`, a list, gets the pictures [height, width, 3] uint8 of the first environment.
    """
    share = np.array([episodes // envs.num_envs + (n < episodes % envs.num_envs) for n in range(envs.num_envs)])
    running, returns = np.zeros(envs.num_envs), []
    exploring = torch.zeros((), dtype=torch.bool, device=generator.device)
    bounds = action_bounds(envs, generator.device)
    obs, _ = envs.reset()
    while share.any():
        if frames is not None:
            frames.append(envs.render()[0])
        if stop:
            break
        obs = torch.from_numpy(obs).to(generator.device, torch.float32)
        noise = torch.randn(len(obs), len(bounds[0]), generator=generator, device=generator.device)
        obs, *results = envs.step(sample_actions(agent, obs, noise, exploring, *bounds)[1].cpu().numpy())
        rewards, overs = true_game(*results)
        running += rewards
        for n in np.flatnonzero(overs):
            if share[n]:
                returns.append(float(running[n]))
                share[n] -= 1
            running[n] = 0
    return returns


# ---- speed -----------------------------------------------------------------------------------------------------------


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def warm_up(step, state) -> None:
    """Call `step` until all is compiled, tuned and allocated, then put back every tensor that `state()` lists."""
    before = {id(x): x.clone() for x in state()}
    for _ in range(3):
        step()
    with torch.no_grad():
        for x in state():  # what only the warm-up brought into being is optimizer state, which starts at zero
            x.copy_(before[id(x)]) if id(x) in before else x.zero_()


def capture(steps, state) -> list:
    """Record a call of each of `steps`, alike but for their arguments, as a CUDA graph; returns their replays.

    The contract of a step: fixed shapes, no branch of the host on a tensor, no allocation of pinned memory, and
    everything that outlives the call is changed in place. What varies between calls is read from tensors.
    The graphs share their scratch memory, so they are to be replayed in the order of `steps`.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(steps[0], state)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in steps]
    with torch.compiler.set_stance("fail_on_recompile"):
        for graph, step in zip(graphs, steps):
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
    return [graph.replay for graph in graphs]


def accelerate(mode: str, agent: Agent, optimizer, replay: Replay, rollout: Rollout, args: Args, metrics) -> tuple:
    """The steps of acting, one for each row of the rollout, the filling of the replay buffer, and the learning phase,
    bound to their tensors.

    Every mode runs the same functions: leave out all that follows an `if`, and eager mode remains.
    """
    sample_fn, train_fn = sample_actions, partial(train_step, gradients=gradients, step_optimizer=step_optimizer)
    learn = partial(update, agent, optimizer, replay, rollout, args, metrics)

    def trained():
        states = [x for state in optimizer.state.values() for x in state.values()]
        return [*agent.parameters(), *agent.buffers(), *states]

    if "compile" in mode:
        torch._dynamo.config.trace_autograd_ops = True
        compiled = partial(torch.compile, fullgraph=True, dynamic=False)
        if metrics.is_cuda:
            sample_fn, train_fn = compiled(sample_actions), partial(train_fn, gradients=compiled(gradients))
        else:  # fast: all in one piece; on a CPU, to call the small policy compiled costs more than it saves
            warm_up(partial(learn, train_fn), state=trained)  # makes the optimizer's state, which step_adam needs
            spell_out(optimizer)
            train_fn = compiled(partial(train_fn, step_optimizer=step_adam), options={"cpp_wrapper": True})

    rows = zip(rollout.obs, rollout.noise, rollout.actions)
    ends = rollout.host_obs, rollout.exploring, rollout.bounds, rollout.host_actions
    acts = [partial(act_step, agent, *ends, *row, sample_fn) for row in rows]
    store, learn = partial(collect, replay, rollout), partial(learn, train_fn)

    if mode == "compile":
        warm_up(acts[0], state=list)
        warm_up(learn, state=trained)
    if "cudagraphs" in mode:
        store = capture([store], state=lambda: [replay.stored])[0]
        return capture(acts, state=list), store, capture([learn], state=trained)[0]
    return acts, store, learn


# ---- command line and run folder -------------------------------------------------------------------------------------


def fail(message: str, status: int = 2):
    """End the process with one sentence on stderr: status 2 for bad input, 1 for a failure while running."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # which first clears a progress bar away
    sys.exit(status)


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line; with --resume or --evaluate, the settings of that run are the defaults."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    run_dir, flag = args.resume or args.evaluate, "--resume" if args.resume else "--evaluate"
    if run_dir is None:
        return args
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())
        if saved["agent"] != Path(__file__).stem:
            fail(f"{flag} {run_dir}: that is a run of {saved['agent']}, this is {Path(__file__).stem}")
        defaults = Args(**saved["args"] | {"run_dir": run_dir, "resume": None, "evaluate": None})
    except FileNotFoundError:
        fail(f"{flag} {run_dir}: no run is there, its config.json is missing")
    except (ValueError, KeyError, TypeError, OSError) as error:
        fail(f"{flag} {run_dir}: this agent cannot use its config.json ({error})")
    return tyro.cli(Args, args=argv, description=__doc__, default=defaults)


def check_sizes(args: Args) -> None:
    """End with a sentence if sizes do not fit together."""
    size = f"one iteration, num_envs x num_steps = {args.num_envs} x {args.num_steps} steps"
    if args.total_timesteps < args.iteration_steps:
        fail(f"--total-timesteps {args.total_timesteps}: less than {size}")
    if args.buffer_size < args.iteration_steps:
        fail(f"--buffer-size {args.buffer_size}: holds less than {size}")
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts}: must come before the end, --total-timesteps")


def check_args(args: Args) -> tuple[torch.device, str]:
    """The device and the mode to use; ends with a sentence about the first flag that cannot be meant."""
    if args.env_id not in (ids := envpool.list_all_envs()):
        near = ", ".join(difflib.get_close_matches(args.env_id, ids, n=3, cutoff=0.4)) or "none"
        fail(f"--env-id {args.env_id}: envpool has no such environment; nearest: {near}")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between {low} and {high}")
    if args.resume and args.evaluate:
        fail("--evaluate: cannot be combined with --resume")
    if args.resume and args.run_dir not in (None, args.resume):
        fail(f"--run-dir {args.run_dir}: a run that goes on by --resume stays in its folder")
    check_sizes(args)
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", args.device):
        fail(f"--device {args.device}: must be auto, cpu, cuda or cuda:N")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        fail(f"--device {args.device}: torch can use {torch.cuda.device_count()} CUDA devices on this machine")
    fastest = "compile-cudagraphs" if device.type == "cuda" else CPU_MODE
    if not shutil.which(os.environ.get("CXX", "g++")):  # torch.compile needs it, on a GPU too
        fastest = "cudagraphs" if device.type == "cuda" else "eager"
    mode = fastest if args.mode == "auto" else args.mode
    if "cudagraphs" in mode and device.type != "cuda":
        fail(f"--mode {mode}: CUDA graphs need a CUDA device, and --device is {device}")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track: needs the package wandb, which is not installed")
    return device, mode


def check_video(args: Args) -> None:
    """End with a sentence if pictures of the environment cannot be drawn: MuJoCo kills the process that then tries."""
    draw = f"envs = envpool.make({args.env_id!r}, 'gymnasium', render_mode='rgb_array'); envs.reset(); envs.render()"
    with tempfile.TemporaryDirectory() as folder:  # for MuJoCo's log
        probe = subprocess.run([sys.executable, "-c", f"import envpool; {draw}"], cwd=folder, capture_output=True)
    if probe.returncode:
        fail(f"--video: {args.env_id} cannot be drawn on this machine; MuJoCo needs an OpenGL driver, and where there "
             "is one, LD_PRELOAD=libEGL.so.1 in the environment of this command")  # fmt: skip


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: aside, flushed, then renamed over the old one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}; what was saved before is untouched", status=1)


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def load_checkpoint(run_dir: Path, flag: str) -> dict:
    """Read a run's checkpoint.pt into the host's memory; `flag` is the one that asked for it."""
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        return checkpoint | {"global_step": int(checkpoint["global_step"]), "returns": list(checkpoint["returns"])}
    except FileNotFoundError:
        fail(f"{flag} {run_dir}: that run ended before its first checkpoint")
    except Exception:  # torch.load raises whatever the bytes lead it into
        fail(f"{flag} {run_dir}: its checkpoint.pt is damaged, or not a checkpoint")


def restore(checkpoint: dict, flag: str, agent: nn.Module, optimizer, generator: torch.Generator) -> None:
    """Put parameters, optimizer state and the random number generator back to where a checkpoint left them."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        for group, saved in zip(optimizer.param_groups, checkpoint["optimizer"]["param_groups"], strict=True):
            saved.update(group, params=saved["params"])  # lr, capturable, ...: of this device, not the checkpoint
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["device"] == generator.device.type:
            generator.set_state(checkpoint["generator"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        fail(f"{flag}: the checkpoint there is not one of this agent on this environment ({reason})")


def check_memory(args: Args, needed: int, device: torch.device) -> None:
    """Say how many bytes the replay buffer takes; end with a sentence if the device has not that much memory left."""
    free, meminfo = math.inf, Path("/proc/meminfo")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif meminfo.exists():  # on Linux; elsewhere an allocation that fails has to do
        free = int(re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text())[1]) * 2**10
    if needed > 0.9 * free:  # the rest is for all else
        fits = int(args.buffer_size * 0.89 * free / needed)
        fail(f"--buffer-size {args.buffer_size}: takes {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} "
             f"GiB free; {fits} would fit")  # fmt: skip
    tqdm.write(f"replay buffer: {needed / 2**30:.2f} GiB on {device}", file=sys.stderr)


def restore_replay(checkpoint: dict, flag: str, replay: nn.Module) -> None:
    """Put the transitions of a checkpoint back into the replay buffer."""
    try:
        replay.load_state_dict(checkpoint["replay"])
    except RuntimeError as error:
        fail(f"{flag}: the replay buffer saved there has another size ({' '.join(str(error).split())[:200]})")


def final_score(args: Args, agent: Agent, device: torch.device, run_dir: Path, stop=()) -> dict:
    """Evaluate, film if asked to, and return what the summary says of it."""
    seed = (args.seed * 10_000 + 5_000) % 2**30  # away from the training environments
    scores, generator = [], torch.Generator(device).manual_seed(args.seed)
    if args.eval_episodes:
        envs = make_envs(args, min(args.eval_episodes, 32), seed)
        scores = evaluate(agent, envs, args.eval_episodes, generator, stop)
    if args.video and not stop:
        evaluate(agent, make_envs(args, 1, seed + 1_000, render=True), 1, generator, stop, frames := [])
        first, *others = map(Image.fromarray, frames)
        first.save(gif := io.BytesIO(), "GIF", save_all=True, append_images=others, duration=50, loop=0)
        write_file(run_dir / "episode.gif", gif.getvalue())
    mean, std = (float(np.mean(scores)), float(np.std(scores))) if scores else (None, None)
    return {"eval_return_mean": mean, "eval_return_std": std, "eval_episodes": len(scores), "eval_returns": scores}


def main(args: Args, stop=()) -> dict:
    """Train, evaluate and summarise one agent; returns the content of summary.json. A `stop` that fills up ends it."""
    started = time.perf_counter()
    device, mode = check_args(args)
    if args.video:
        check_video(args)
    agent_name, saved_dir = Path(__file__).stem, args.resume or args.evaluate
    default_dir = f"runs/{args.env_id}__{agent_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(saved_dir or args.run_dir or default_dir)
    if not saved_dir and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        fail(f"--run-dir {run_dir}: is not an empty folder; to go on with a run, name it with --resume")

    # ---- seed and build ----
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or min(2, cpu_cores()))  # fast: a second one makes 1.6 times the updates
    torch.set_flush_denormal(True)  # fast: dead units leave Adam denormals, which a CPU is 13 times as slow with
    bf16_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 = args.precision == "bf16" or (args.precision == "auto" and bf16_cpu)
    # fast: by oneDNN, matrix products take half of MKL's time on AMD; in fp32 still, which with AMX they would not be
    onednn = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
    fastest = "high" if device.type == "cuda" and args.precision != "fp32" else "highest"
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" and onednn else fastest)
    flag = "--evaluate" if args.evaluate else "--resume"
    checkpoint = {"global_step": 0, "wall_seconds": 0.0, "returns": []}
    saved = args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists())  # else killed before the first one
    if saved:
        checkpoint = load_checkpoint(run_dir, flag)
    global_step, returns = checkpoint["global_step"], deque(checkpoint["returns"], maxlen=100)
    env_seed = (args.seed * 10_000 + global_step) % 2**30  # far from other seeds' environments, and new after a resume
    envs = make_envs(args, 1 if args.evaluate else args.num_envs, env_seed)
    agent = Agent(envs.single_observation_space.shape, *envs.single_action_space.shape, bf16).to(device)
    lr = torch.tensor(args.learning_rate, device=device)
    params = [*agent.critics.parameters(), *agent.actor.parameters()]
    optimizer = torch.optim.Adam(params, lr, fused=True, capturable=device.type == "cuda")
    if saved:
        restore(checkpoint, f"{flag} {run_dir}", agent, optimizer, generator)
        lr = optimizer.param_groups[0]["lr"]
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    if args.evaluate:
        return summary | final_score(args, agent, device, run_dir, stop) | {"run_dir": str(run_dir)}
    rollout, metrics = Rollout(args, envs, device), torch.zeros(len(METRICS), device=device)
    make_replay = partial(Replay, args.buffer_size, rollout)
    check_memory(args, sum(x.nbytes for x in make_replay(torch.device("meta")).buffers()), device)
    replay, learn_from = make_replay(device), args.learning_starts
    if "replay" in checkpoint:
        restore_replay(checkpoint, f"{flag} {run_dir}", replay)
    elif global_step:
        learn_from += global_step
        tqdm.write(f"the replay buffer was not saved: learning goes on at step {learn_from}", file=sys.stderr)

    def wall_seconds():
        return checkpoint["wall_seconds"] + time.perf_counter() - started

    def save():
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "returns": list(returns)}
        state |= {"generator": generator.get_state(), "device": device.type}
        state |= {"replay": replay.state_dict()} if args.checkpoint_buffer else {}
        torch.save(state | {"global_step": global_step, "wall_seconds": wall_seconds()}, content := io.BytesIO())
        write_file(run_dir / "checkpoint.pt", content.getbuffer())

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--run-dir {run_dir}: cannot be made ({error.strerror})")
    write_json(run_dir / "config.json", {"agent": agent_name, "args": asdict(args)})
    write_file(run_dir / Path(__file__).name, Path(__file__).read_bytes())
    save()
    if args.track:
        import wandb

        wandb.init(project="redline", name=run_dir.name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1, flush_secs=30)

    clock = time.perf_counter()
    acts, store, learn = accelerate(mode, agent, optimizer, replay, rollout, args, metrics)
    compile_seconds = time.perf_counter() - clock
    if "replay" in checkpoint:
        replay.load_state_dict(checkpoint.pop("replay"))  # again: the warm-up stored rows of its own

    # ---- the loop ----
    agent.exploration_noise.fill_(args.exploration_noise)
    host_obs, host_actions, host_rewards, host_terminations, host_dones = (
        getattr(rollout, f"host_{name}").numpy() for name in ("obs", "actions", "rewards", "terminations", "dones")
    )
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    host_obs[:], _ = envs.reset()
    dones = np.zeros(args.num_envs, dtype=bool)
    running, finished = np.zeros((2, args.num_envs)), []  # returns and lengths of games under way; those of ended ones
    first, last = math.ceil(global_step / args.iteration_steps) + 1, args.num_iterations
    log_every, saved_at, learned = max(1, last // 1000), time.perf_counter(), 0
    speeds = dict.fromkeys(("sps", "sps_rollout", "sps_update"))
    for iteration in range(first, last + 1):
        learning = global_step >= learn_from
        learned += learning
        if learned <= 2:  # SPS counts from the second iteration that learns: the first warms up what is left
            rollout_seconds, update_seconds, loop_start, loop_step = 0.0, 0.0, time.perf_counter(), global_step
        if args.anneal_lr:
            lr.fill_(args.learning_rate * (1 - (iteration - 1) / last))
        rollout.exploring.fill_(not learning)
        draw_noise(rollout, generator)

        clock = time.perf_counter()
        for t, act in enumerate(acts):
            host_dones[t] = dones
            act()
            if arrived:
                arrived.record()
                arrived.synchronize()  # sync: the actions have arrived in host_actions; the one wait of the loop
            obs, rewards, terminations, truncations, infos = envs.step(host_actions)
            host_obs[:], host_rewards[t], host_terminations[t] = obs, rewards, terminations
            true_rewards, overs = true_game(rewards, terminations, truncations, infos)
            running += true_rewards, ~dones
            dones = terminations | truncations
            if overs.any():
                finished += running[:, overs].T.tolist()
                running[:, overs] = 0
        host_dones[-1] = dones
        rollout_seconds += time.perf_counter() - clock

        clock = time.perf_counter()
        store()
        if learning:
            learn()
        if arrived:
            torch.cuda.synchronize(device)  # for the clock: nothing is held up that could go on without the update
        update_seconds += time.perf_counter() - clock

        global_step += args.iteration_steps
        progress.update(args.iteration_steps)
        stopping = iteration == last or bool(stop)
        saving = stopping or time.perf_counter() - saved_at > 60 * args.checkpoint_minutes
        if saving or iteration % log_every == 0:
            losses = dict(zip(METRICS, metrics.tolist())) if learned else {}
            if not all(map(math.isfinite, losses.values())):
                progress.close()
                writer.close()
                fail(f"the loss is not finite any more at step {global_step}: {losses}. A lower --learning-rate may "
                     f"help; {run_dir}/checkpoint.pt is from before", status=1)  # fmt: skip
            seconds = time.perf_counter() - loop_start, rollout_seconds, update_seconds
            speeds = {name: (global_step - loop_step) / s for name, s in zip(speeds, seconds)}
            scalars = {"charts/SPS": speeds["sps"], "charts/learning_rate": lr.item()}
            scalars |= {f"losses/{name}": value for name, value in losses.items()}
            if finished:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(finished, axis=0)
                returns.extend(episode_return for episode_return, _ in finished)
                finished.clear()
                progress.set_postfix_str(f"return {np.mean(returns):.1f}", refresh=False)
            try:
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, global_step)
            except OSError as error:  # from its thread, which could not write what it was given before
                save()
                fail(f"cannot write the curves in {run_dir}: {error.strerror}", status=1)
        if saving:
            save()
            saved_at = time.perf_counter()
        if stopping:
            break
    progress.close()
    writer.close()

    # ---- score and summary ----
    agent.exploration_noise.zero_()
    summary |= {"global_step": global_step, "train_return_mean": float(np.mean(returns)) if returns else None}
    summary |= speeds | final_score(args, agent, device, run_dir, stop)
    summary |= {"stopped_by": signal.Signals(stop[0]).name if stop else None, "compile_seconds": compile_seconds}
    summary |= {"wall_seconds": wall_seconds(), "run_dir": str(run_dir)}
    write_json(run_dir / "summary.json", summary)
    return summary


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # TensorBoard's thread has its failure told by the next add_scalar
    signals = []  # the first one ends the loop in order, a second one the process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number) or signal.signal(number, signal.SIG_DFL))
    try:
        result = main(parse_args(), signals)
    except (OSError, torch.OutOfMemoryError) as error:
        fail(str(error).splitlines()[0], status=1)
    print(json.dumps(result))
    sys.exit(128 + signals[0] if signals else 0)
