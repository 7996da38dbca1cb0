# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
"""Deep Q-network (DQN) on Atari, from pixels. Mnih et al. 2015, Nature 518

    python agents/dqn_atari.py --env-id Pong-v5 --seed 1

Differs from the paper in
- several environments share the replay buffer: after each of their steps follow the updates that it owes, as many as
  for one environment, in one learning phase;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is never drawn from the replay buffer;
- Adam on the squared error, the norm of its gradient cut, instead of RMSProp on an error that is cut itself;
- exploration ends after a tenth of the run, learning starts after 80,000 steps, and the target network follows more
  often, as in CleanRL;
- returns, logged and evaluated, are those of whole games, unclipped, however rewards and lives train the agent.
"""

import ctypes
import difflib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ---- Run ----
    seed: int = 1
    """seed of the network, the sampling noise and the environments"""
    total_timesteps: int = 10_000_000
    """environment steps to train for, counted over all environments"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N"""
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"
    """how the same functions are run; auto is the fastest measured for the device"""
    eval_episodes: int = 10
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
    env_id: str = "Pong-v5"
    """name of the environment in envpool"""
    num_envs: int = 8
    """environments stepped together"""
    frame_skip: int = 4
    """frames that one action is held for"""
    sticky_actions: float = 0.0
    """probability that the previous action is repeated instead (Machado et al. 2018 recommend 0.25)"""
    full_action_space: bool = False
    """use all 18 joystick actions instead of those that the game responds to"""
    episodic_life: bool = True
    """train with every lost life as the end of an episode"""
    clip_reward: bool = True
    """train on the sign of the reward"""

    # ---- Algorithm ----
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    learning_starts: int = 80_000
    """environment steps before the first update"""
    train_frequency: int = 4
    """environment steps, counted over all environments, that one update follows"""
    batch_size: int = 32
    """transitions of one update"""
    learning_rate: float = 1e-4
    """Adam's learning rate at the start"""
    anneal_lr: bool = False
    """lower the learning rate linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    target_network_frequency: int = 1_000
    """environment steps, counted over all environments, from one update of the target network to the next"""
    tau: float = 1.0
    """how far an update of a target network moves it towards the network: 1 makes it a copy"""
    start_e: float = 1.0
    """probability of a random action at the start"""
    end_e: float = 0.01
    """probability of a random action from the end of exploration on, and in the evaluation"""
    exploration_fraction: float = 0.1
    """part of the run over which that probability falls linearly from start_e to end_e"""
    max_grad_norm: float = 10.0
    """largest norm of the gradient"""

    # ---- Speed ----
    torch_threads: int = 0
    """CPU threads of torch; 0 takes what was measured best for this agent"""
    env_threads: int = 0
    """CPU threads of envpool; 0 takes what was measured best for this agent"""

    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """arithmetic of the network: auto is tf32 on CUDA, bf16 on a CPU with AVX512-BF16 and fp32 on any other"""

    @property
    def num_steps(self) -> int:
        """Steps of every environment in one iteration: the fewest that owe a whole number of updates."""
        return self.train_frequency // math.gcd(self.num_envs, self.train_frequency)

    @property
    def iteration_steps(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates in one learning phase."""
        return self.iteration_steps // self.train_frequency

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.iteration_steps


MANY = 2**31 - 1
LIMITS = {  # smallest and largest value of each number
    "seed": (0, MANY), "total_timesteps": (1, 10**15), "eval_episodes": (0, MANY), "checkpoint_minutes": (0, MANY),
    "num_envs": (1, MANY), "buffer_size": (1, MANY), "learning_starts": (0, MANY), "train_frequency": (1, 10_000),
    "batch_size": (1, MANY), "learning_rate": (0, 1), "gamma": (0, 1), "target_network_frequency": (1, MANY),
    "tau": (0, 1), "start_e": (0, 1), "end_e": (0, 1), "exploration_fraction": (0, 1), "max_grad_norm": (0, MANY),
    "torch_threads": (0, 1024), "env_threads": (0, 1024), "frame_skip": (1, 1000), "sticky_actions": (0, 1),
}  # fmt: skip
METRICS = ("td_loss", "q_values", "grad_norm")
CPU_MODE = "compile"  # of --mode auto; 1.4 times the steps of eager mode on Breakout, and runs are long
OPENMP = ctypes.CDLL(torch._C.__file__)  # what torch links to can be called by way of it


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
    """Atari games: the last four grey pictures of each, [num_envs, 4, 84, 84] uint8; env i has seed + i."""
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # gymnasium on envpool's float64 bounds
    if envpool.make_spec(args.env_id).observation_space.shape != (4, 84, 84):
        fail(f"--env-id {args.env_id}: this agent plays Atari games, for example Pong-v5")
    threads = min(num_envs, args.env_threads or cpu_cores())
    # fast: where torch keeps all cores busy, too, the system lets two of these threads wait for each other on one core
    affinity = 0 if torch.get_num_threads() > 1 and threads == os.cpu_count() else -1  # one core each, or any
    extra = {"render_mode": "rgb_array"} if render else {}
    return EnvPool(
        envpool.make(
            args.env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed,
            frame_skip=args.frame_skip, max_episode_steps=108_000 // args.frame_skip,  # half an hour of the game
            repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space,
            thread_affinity_offset=affinity,
            episodic_life=args.episodic_life, reward_clip=args.clip_reward, **extra,
        )
    )  # fmt: skip


def true_game(rewards, terminations, truncations, infos):
    """The game's own rewards [num_envs] and whether a game is over [num_envs], however training shapes them."""
    return infos["info:reward"], (infos["info:terminated"] != 0) | truncations


# ---- network ---------------------------------------------------------------------------------------------------------


def layer_init(layer, std=2**0.5):
    """Orthogonal weights of gain `std`, biases zero."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def epsilon_greedy(q_values, epsilon):
    """Log-probabilities of actions, [batch, num_actions]: any of them with probability epsilon, else the best one."""
    greedy = torch.zeros_like(q_values).scatter(-1, q_values.argmax(-1, keepdim=True), 1)
    return ((1 - epsilon) * greedy + epsilon / q_values.shape[-1]).log()


def blocks(pictures):
    """Pictures [..., 84, 84] uint8 as 21 x 21 blocks of 4 x 4 pixels, [..., 21, 21, 16].

    fast: the first convolution, over 8 x 8 pixels with a stride of 4, is then one over 2 x 2 blocks with a stride of 1
    and 16 channels for each of its pictures, which takes half the time for its gradients in bf16 on a CPU with AMX.
    """
    rows = pictures.view(torch.int32).unflatten(-2, (21, 4))  # fast: four pixels are moved as one number
    return rows.transpose(-1, -2).contiguous().view(torch.uint8)


class QNetwork(nn.Module):
    """The convolutional network of Mnih et al. 2015 (Nature 518) under a head of Q-values."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.convolutions = nn.Sequential(
            layer_init(nn.Conv2d(64, 32, 2)), nn.ReLU(),  # 8 x 8 pixels with a stride of 4: see `blocks`
            layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
        )  # fmt: skip
        self.linear, self.head = layer_init(nn.Linear(7 * 7 * 64, 512)), layer_init(nn.Linear(512, num_actions), 1)

    def forward(self, obs):
        """Q-values [batch, num_actions] for obs [batch, 4, 21, 21, 16] uint8."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        # fast: channels lie side by side (channels_last), as convolutions take them, and stay so for the linear layer;
        # joined after the cast, since torch.compile casts joined bytes one by one
        pixels = torch.cat([picture.to(dtype) / 255 for picture in obs.unbind(1)], -1)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            features = self.convolutions(pixels.movedim(-1, 1)).movedim(1, -1).flatten(1)
            hidden = self.linear(features).relu().float()  # head and loss are always float32
        return self.head(hidden)


class Agent(nn.Module):
    """A Q-network, the target network that follows it, and how many updates they have had."""

    def __init__(self, *shapes):
        super().__init__()
        self.q_network = QNetwork(*shapes)
        self.target_network = deepcopy(self.q_network).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("epsilon", torch.zeros(()), persistent=False)  # main sets it: see --start-e

    def policy(self, obs):
        """Log-probabilities [batch, num_actions] of the epsilon-greedy policy for obs [batch, ...]."""
        return epsilon_greedy(self.q_network(obs), self.epsilon)


# ---- algorithm -------------------------------------------------------------------------------------------------------


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
        obs_shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
        # obs[t] came with dones[t]; actions[t], taken there, brought rewards[t] and terminations[t]
        self.obs = torch.zeros(T + 1, N, obs_shape[0], 21, 21, 16, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(T, N, dtype=torch.int64, device=device)
        self.gumbel = torch.zeros(T, N, num_actions, device=device)
        self.random = torch.zeros(args.num_updates * args.batch_size, dtype=torch.int64, device=device)
        self.host_rewards, self.rewards = twins(T, N)
        self.host_terminations, self.terminations = twins(T, N)
        self.host_dones, self.dones = twins(T + 1, N)
        self.host_ages, self.ages = twins(T + 1, N, dtype=torch.int64)  # of the frames before obs[t], how many to stack
        self.host_obs = twins(N, *obs_shape, dtype=torch.uint8)[0]  # the newest observations and the answer to them
        self.host_actions = twins(N, dtype=torch.int32)[0]


class FrameReplay(nn.Module):
    """The latest `size` transitions, on the device and allocated once, every frame kept once.

    Its rings have rows like those of the rollout, [num_rows, num_envs, ...]. `places` lists where in them, at
    row * num_envs + env, transitions are, in the order in which they came: those of reset rows are left out. `written`
    counts rows and `stored` transitions, ever; `before` [num_rows] is what the latter was when a row came.
    """

    def __init__(self, size: int, rollout: Rollout, device: torch.device):
        super().__init__()
        self.num_envs, self.depth = rollout.obs.shape[1:3]
        self.num_rows = math.ceil(size / self.num_envs) + self.depth  # the oldest ones only complete later stacks
        self.num_places = self.num_rows * self.num_envs
        rows = {"frames": rollout.obs[:, :, -1], "ages": rollout.ages, "actions": rollout.actions}
        rows |= {"rewards": rollout.rewards, "terminations": rollout.terminations}
        for name, x in rows.items():
            self.register_buffer(name, torch.zeros(self.num_rows, *x.shape[1:], dtype=x.dtype, device=device))
        counts = {"places": [self.num_places + 1], "before": [self.num_rows], "written": [], "stored": []}
        for name, shape in counts.items():  # the last of the places takes what is not to be kept
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device))

    def store(self, obs, ages, actions, rewards, terminations, valid) -> None:
        """Add T steps of all environments: obs and ages [T + 1, N, ...], whose first row is the last one of the call
        before; actions, rewards and terminations [T, N]; `valid` [T, N] bool, false in reset rows.
        """
        rows = (self.written + torch.arange(len(obs), device=obs.device)) % self.num_rows
        self.frames.index_copy_(0, rows, obs[:, :, -1])
        self.ages.index_copy_(0, rows, ages)
        for ring, values in zip((self.actions, self.rewards, self.terminations), (actions, rewards, terminations)):
            ring.index_copy_(0, rows[:-1], values)

        numbers = (self.stored + valid.flatten().cumsum(0)).view_as(valid)
        here = rows[:-1, None] * self.num_envs + torch.arange(self.num_envs, device=obs.device)
        places = torch.where(valid, (numbers - 1) % self.num_places, self.num_places)
        self.places.index_copy_(0, places.flatten(), here.flatten())
        self.before.index_copy_(0, rows, torch.cat([self.stored[None], numbers[:, -1]]))
        self.stored.copy_(numbers[-1, -1])
        self.written += len(valid)

    def stacks(self, rows, envs):
        """Observations [batch, depth, 21, 21, 16] that came in these rows to these envs, [batch] each. The first frame
        of a game stands for those before it, as in envpool.
        """
        back = torch.arange(self.depth - 1, -1, -1, device=rows.device)
        back = torch.minimum(back, self.ages[rows, envs, None])
        places = (rows[:, None] - back) % self.num_rows * self.num_envs + envs[:, None]
        # fast: copies whole frames, where indexing goes from pixel to pixel; a fifth of its time on a CPU
        frames = self.frames.flatten(0, 1).index_select(0, places.flatten())
        return frames.unflatten(0, places.shape)

    def sample(self, random) -> list:
        """Observations, actions, rewards, terminations and next observations, [batch, ...] each, of any of the
        transitions held, by random [batch] int64 from 0 on.
        """
        # of those with all of their frames; by `take`, as an index that is a lone number would be read on the host
        oldest = self.before.take((self.written + self.depth) % self.num_rows)
        numbers = oldest + random % (self.stored - oldest).clamp(min=1)
        places = self.places[numbers % self.num_places]
        rows, envs = places // self.num_envs, places % self.num_envs
        answers = [ring[rows, envs] for ring in (self.actions, self.rewards, self.terminations)]
        return [self.stacks(rows, envs), *answers, self.stacks((rows + 1) % self.num_rows, envs)]


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration: Gumbel noise for its actions, numbers for what its updates replay.

    Drawn here, outside everything compiled or captured, it is the same in every mode, and no graph can freeze it.
    """
    rollout.gumbel.exponential_(generator=generator).log_().neg_()
    rollout.random.random_(generator=generator)


def sample_actions(agent: Agent, obs, gumbel):
    """Actions [num_envs] int64: argmax(logits + Gumbel noise [num_envs, num_actions]) is a draw from the policy."""
    return (agent.policy(obs) + gumbel).argmax(-1)


@torch.no_grad()
def act_step(agent: Agent, host_obs, obs, gumbel, actions, host_actions, sample_actions=sample_actions) -> None:
    """One step of acting: host_obs into the rollout's row `obs`, actions for it into `actions` and host_actions."""
    obs.copy_(blocks(host_obs.to(obs.device, non_blocking=True)))
    actions.copy_(sample_actions(agent, obs, gumbel))
    host_actions.copy_(actions, non_blocking=True)


@torch.no_grad()
def collect(replay: FrameReplay, rollout: Rollout) -> None:
    """Bring what the environments answered onto the device, and the iteration's transitions into the replay buffer."""
    rollout.obs[-1].copy_(blocks(rollout.host_obs.to(rollout.obs.device, non_blocking=True)))
    rollout.rewards.copy_(rollout.host_rewards, non_blocking=True)
    rollout.terminations.copy_(rollout.host_terminations, non_blocking=True)
    rollout.dones.copy_(rollout.host_dones, non_blocking=True)
    rollout.ages.copy_(rollout.host_ages, non_blocking=True)

    valid = rollout.dones[:-1] == 0  # the action of a reset row did nothing
    answers = rollout.actions, rollout.rewards, rollout.terminations
    replay.store(rollout.obs, rollout.ages, *answers, valid)


def dqn_loss(agent: Agent, gamma: float, obs, actions, rewards, terminations, next_obs):
    """Half the mean squared error of Q(obs, actions) against one-step targets (Mnih et al. 2015, equation 2), over a
    minibatch, each argument [batch_size, ...], and its first 2 METRICS.
    """
    with torch.no_grad():
        targets = rewards + gamma * (1 - terminations) * agent.target_network(next_obs).amax(-1)
    q_values = agent.q_network(obs).gather(-1, actions[:, None]).squeeze(-1)
    loss = 0.5 * (q_values - targets).square().mean()
    # stacked anew: torch.compile loses the gradient of a view of what is returned detached, too (pytorch#195357)
    return loss, torch.stack([loss, q_values.mean()]).detach()


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


@torch.no_grad()
def update_target(agent: Agent, args: Args) -> None:
    """Count an update, and move the target network if one is due among the steps that this update was owed for."""
    agent.updates += 1
    due = agent.updates * args.train_frequency % args.target_network_frequency < args.train_frequency
    weight = due * args.tau  # no branch: that would be one of the host, on a tensor
    for target, param in zip(agent.target_network.parameters(), agent.q_network.parameters()):
        target.lerp_(param, weight)


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


def train_step(agent: Agent, optimizer, minibatch, args: Args, gradients, step_optimizer):
    """One update by a minibatch from the replay buffer, and of the target network if due; its METRICS."""
    params = tuple(agent.q_network.parameters())
    grads, metrics = gradients(dqn_loss, params, args.max_grad_norm, agent, args.gamma, *minibatch)
    step_optimizer(optimizer, params, grads)
    update_target(agent, args)
    return metrics


def update(agent: Agent, optimizer, replay: FrameReplay, rollout: Rollout, args: Args, metrics, train_step) -> None:
    """The learning phase: the updates that an iteration owes; `metrics` gets the means of METRICS."""
    metrics.zero_()
    batch = replay.sample(rollout.random)  # not compiled: torch.compile gathers pixel by pixel
    for minibatch in zip(*(x.split(args.batch_size) for x in batch)):
        metrics += train_step(agent, optimizer, minibatch, args)
    metrics /= args.num_updates


@torch.no_grad()
def evaluate(agent: Agent, envs, episodes: int, generator: torch.Generator, stop=(), frames=None) -> list[float]:
    """True returns of `episodes` whole games, actions sampled from the policy as in training; fewer after a `stop`.

    Each environment plays a share of the games fixed beforehand: first come, first counted would favour short games.
    `frames`, a list, gets the pictures [height, width, 3] uint8 of the first environment.
    """
    share = np.array([episodes // envs.num_envs + (n < episodes % envs.num_envs) for n in range(envs.num_envs)])
    running, returns = np.zeros(envs.num_envs), []
    obs, _ = envs.reset()
    while share.any():
        if frames is not None:
            frames.append(envs.render()[0])
        if stop:
            break
        logits = agent.policy(blocks(torch.from_numpy(obs).to(generator.device)))
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        obs, *results = envs.step((logits - noise).argmax(-1).to("cpu", torch.int32).numpy())
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


def end_threads() -> None:
    """End torch's threads but this one; the next operation on several threads starts new ones, which takes 50 us.

    fast: after an operation they wait for the next one for milliseconds without leaving their cores, and that is while
    the environments step. A GPU needs none of them.
    """
    if torch.get_num_threads() > 1 and hasattr(OPENMP, "omp_pause_resource_all"):  # OpenMP 5.0, not in every build
        OPENMP.omp_pause_resource_all(1)  # 1: keep what is no thread


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


def accelerate(mode: str, agent: Agent, optimizer, replay: FrameReplay, rollout: Rollout, args: Args, metrics) -> tuple:
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
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, options={"cpp_wrapper": not metrics.is_cuda})
        sample_fn = compiled(sample_actions)
        if metrics.is_cuda:
            train_fn = partial(train_fn, gradients=compiled(gradients))
        else:  # fast: a whole update as one piece
            warm_up(partial(learn, train_fn), state=trained)  # makes the optimizer's state, which step_adam needs
            spell_out(optimizer)
            train_fn = compiled(partial(train_fn, step_optimizer=step_adam))

    rows = zip(rollout.obs, rollout.gumbel, rollout.actions)
    acts = [partial(act_step, agent, rollout.host_obs, *row, rollout.host_actions, sample_fn) for row in rows]
    store, learn = partial(collect, replay, rollout), partial(learn, train_fn)

    if mode == "compile":
        warm_up(acts[0], state=list)
        warm_up(learn, state=trained)
    if "cudagraphs" in mode:
        store = capture([store], state=lambda: [replay.before, replay.written, replay.stored])[0]
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
    torch.set_num_threads(args.torch_threads or (cpu_cores() if device.type == "cpu" else 1))
    torch.set_flush_denormal(True)  # fast: dead units leave Adam denormals, which a CPU is 13 times as slow with
    torch.backends.cudnn.benchmark = True
    # not by the newer fp32_precision: while that is set, torch.compile stumbles over its own reading of the older flags
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_float32_matmul_precision("highest" if args.precision == "fp32" or device.type == "cpu" else "high")
    bf16_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 = args.precision == "bf16" or (args.precision == "auto" and bf16_cpu)
    flag = "--evaluate" if args.evaluate else "--resume"
    checkpoint = {"global_step": 0, "wall_seconds": 0.0, "returns": []}
    saved = args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists())  # else killed before the first one
    if saved:
        checkpoint = load_checkpoint(run_dir, flag)
    global_step, returns = checkpoint["global_step"], deque(checkpoint["returns"], maxlen=100)
    env_seed = (args.seed * 10_000 + global_step) % 2**30  # far from other seeds' environments, and new after a resume
    envs = make_envs(args, 1 if args.evaluate else args.num_envs, env_seed)
    agent = Agent(int(envs.single_action_space.n), bf16).to(device, memory_format=torch.channels_last)
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(agent.q_network.parameters(), lr, fused=True, capturable=device.type == "cuda")
    if saved:
        restore(checkpoint, f"{flag} {run_dir}", agent, optimizer, generator)
        lr = optimizer.param_groups[0]["lr"]
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    agent.epsilon.fill_(args.end_e)
    if args.evaluate:
        return summary | final_score(args, agent, device, run_dir, stop) | {"run_dir": str(run_dir)}
    rollout, metrics = Rollout(args, envs, device), torch.zeros(len(METRICS), device=device)
    make_replay = partial(FrameReplay, args.buffer_size, rollout)
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
        replay.written += 1  # the newest row is an end: these environments do not go on from there

    # ---- the loop ----
    host_obs, host_actions, host_rewards, host_terminations, host_dones, host_ages = (
        getattr(rollout, f"host_{name}").numpy()
        for name in ("obs", "actions", "rewards", "terminations", "dones", "ages")
    )
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    host_obs[:], _ = envs.reset()
    dones = overs = lives = np.zeros(args.num_envs, dtype=bool)
    ages = np.zeros(args.num_envs, dtype=np.int64)  # frames of the same game before the newest one, as far as stacked
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
        explored = (iteration - 1) / last, (0, args.exploration_fraction), (args.start_e, args.end_e)
        agent.epsilon.fill_(np.interp(*explored))
        draw_noise(rollout, generator)

        clock = time.perf_counter()
        for t, act in enumerate(acts):
            host_dones[t], host_ages[t] = dones, ages
            act()
            if arrived:
                arrived.record()
                arrived.synchronize()  # sync: the actions have arrived in host_actions; the one wait of the loop
            end_threads()
            obs, rewards, terminations, truncations, infos = envs.step(host_actions)
            host_obs[:], host_rewards[t], host_terminations[t] = obs, rewards, terminations
            # a new game follows the end of one, which can also come unseen, in the pause after a lost life
            fresh = overs | (dones & (infos["info:lives"] > lives))
            ages, lives = np.where(fresh, 0, np.minimum(ages + 1, replay.depth - 1)), infos["info:lives"]
            true_rewards, overs = true_game(rewards, terminations, truncations, infos)
            running += true_rewards, ~dones
            dones = terminations | truncations
            if overs.any():
                finished += running[:, overs].T.tolist()
                running[:, overs] = 0
        host_dones[-1], host_ages[-1] = dones, ages
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
            scalars |= {"charts/epsilon": agent.epsilon.item()}
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
    agent.epsilon.fill_(args.end_e)
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
