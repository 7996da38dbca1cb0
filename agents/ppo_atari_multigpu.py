# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
"""PPO on Atari, from pixels, on several GPUs or machines. Schulman et al. 2017, arXiv 1707.06347

    torchrun --standalone --nproc-per-node=4 agents/ppo_atari_multigpu.py --env-id Breakout-v5 --num-envs 32 --seed 1

Every process (rank) plays its share of the environments on a device of its own; their gradients are summed before each
step of the optimizer, so that they train as one process would on the joined batch. Without torchrun it is one rank.
The defaults are the paper's Atari settings. Differs from the paper in
- the value loss is clipped, weights start orthogonal, Adam's epsilon is 1e-5: as in the authors' published code;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of every loss;
- returns, logged and evaluated, are those of whole games, unclipped, however rewards and lives train the agent.
"""

import atexit
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
import uuid
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
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
    num_steps: int = 128
    """steps of every environment in one rollout"""
    learning_rate: float = 2.5e-4
    """Adam's learning rate at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches that one epoch splits the rollout into"""
    update_epochs: int = 4
    """passes over the rollout in one learning phase"""
    norm_adv: bool = True
    """normalise the advantages within each minibatch"""
    clip_coef: float = 0.1
    """how far the probability ratio may move before its gradient is cut"""
    clip_vloss: bool = True
    """clip the change of the value estimate as well"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""

    # ---- Speed ----
    torch_threads: int = 0
    """CPU threads of torch; 0 takes what was measured best for this agent"""
    env_threads: int = 0
    """CPU threads of envpool; 0 takes what was measured best for this agent"""

    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """arithmetic of the network: auto is tf32 on CUDA, bf16 on a CPU with AVX512-BF16 and fp32 on any other"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


MANY = 2**31 - 1
LIMITS = {  # smallest and largest value of each number
    "seed": (0, MANY), "total_timesteps": (1, 10**15), "eval_episodes": (0, MANY), "checkpoint_minutes": (0, MANY),
    "num_envs": (1, MANY), "num_steps": (1, MANY), "num_minibatches": (1, MANY), "update_epochs": (1, MANY),
    "learning_rate": (0, 1), "gamma": (0, 1), "gae_lambda": (0, 1), "clip_coef": (0, MANY), "ent_coef": (0, MANY),
    "vf_coef": (0, MANY), "max_grad_norm": (0, MANY), "torch_threads": (0, 1024), "env_threads": (0, 1024),
    "frame_skip": (1, 1000), "sticky_actions": (0, 1),
}  # fmt: skip
METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")
CPU_MODE = "compile"  # of --mode auto; 1.12 times the steps of eager mode on Breakout, and runs are long
MEETING = 55  # seconds in which all ranks have to have started
BEAT = 5  # seconds between two signs of life of a rank
PATIENCE = 30  # seconds of silence after which a rank is lost
ENDING = threading.Event()  # set once this process is about to part from the other ranks, for the thread that watches


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
    extra = {"render_mode": "rgb_array"} if render else {}
    return EnvPool(
        envpool.make(
            args.env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed,
            frame_skip=args.frame_skip, max_episode_steps=108_000 // args.frame_skip,  # half an hour of the game
            repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space,
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


def blocks(pictures):
    """Pictures [..., 84, 84] uint8 as 21 x 21 blocks of 4 x 4 pixels, [..., 21, 21, 16].

    fast: the first convolution, over 8 x 8 pixels with a stride of 4, is then one over 2 x 2 blocks with a stride of 1
    and 16 channels for each of its pictures, which takes half the time for its gradients in bf16 on a CPU with AMX.
    """
    rows = pictures.view(torch.int32).unflatten(-2, (21, 4))  # fast: four pixels are moved as one number
    return rows.transpose(-1, -2).contiguous().view(torch.uint8)


class Agent(nn.Module):
    """The convolutional network of Mnih et al. 2015 (Nature 518) under a policy head and a value head."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.convolutions = nn.Sequential(
            layer_init(nn.Conv2d(64, 32, 2)), nn.ReLU(),  # 8 x 8 pixels with a stride of 4: see `blocks`
            layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(),
        )  # fmt: skip
        self.linear = layer_init(nn.Linear(7 * 7 * 64, 512))
        self.actor, self.critic = layer_init(nn.Linear(512, num_actions), 0.01), layer_init(nn.Linear(512, 1), 1)

    def hidden(self, obs):
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        # fast: channels lie side by side (channels_last), as convolutions take them, and stay so for the linear layer;
        # joined after the cast, since torch.compile casts joined bytes one by one
        pixels = torch.cat([picture.to(dtype) / 255 for picture in obs.unbind(1)], -1)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            features = self.convolutions(pixels.movedim(-1, 1)).movedim(1, -1).flatten(1)
            return self.linear(features).relu().float()  # heads and losses are always float32

    def policy(self, obs):
        """Logits [batch, num_actions] for obs [batch, 4, 21, 21, 16] uint8."""
        return self.actor(self.hidden(obs))

    def value(self, obs):
        """Values [batch] for obs [batch, 4, 21, 21, 16] uint8."""
        return self.critic(self.hidden(obs)).squeeze(-1)

    def forward(self, obs):
        """Logits [batch, num_actions] and values [batch]."""
        hidden = self.hidden(obs)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


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
        self.permutations = torch.zeros(args.update_epochs, T * N, dtype=torch.int64, device=device)
        self.host_rewards, self.rewards = twins(T, N)
        self.host_terminations, self.terminations = twins(T, N)
        self.host_dones, self.dones = twins(T + 1, N)
        self.host_obs = twins(N, *obs_shape, dtype=torch.uint8)[0]  # the newest observations and the answer to them
        self.host_actions = twins(N, dtype=torch.int32)[0]


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration: Gumbel noise for its actions and the order of its minibatches.

    Drawn here, outside everything compiled or captured, it is the same in every mode, and no graph can freeze it.
    """
    rollout.gumbel.exponential_(generator=generator).log_().neg_()
    for permutation in rollout.permutations:
        torch.randperm(len(permutation), generator=generator, out=permutation)


def sample_actions(agent: Agent, obs, gumbel):
    """Actions [num_envs] int64: argmax(logits + Gumbel noise [num_envs, num_actions]) is a draw from the policy."""
    return (agent.policy(obs) + gumbel).argmax(-1)


@torch.no_grad()
def act_step(agent: Agent, host_obs, obs, gumbel, actions, host_actions, sample_actions=sample_actions) -> None:
    """One step of acting: host_obs into the rollout's row `obs`, actions for it into `actions` and host_actions."""
    obs.copy_(blocks(host_obs.to(obs.device, non_blocking=True)))
    actions.copy_(sample_actions(agent, obs, gumbel))
    host_actions.copy_(actions, non_blocking=True)


def gae(rewards, values, terminations, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    rewards, terminations: [T, N]; values, dones: [T + 1, N], dones[t + 1] marking that step t ended its episode.
    A truncated episode bootstraps from values[t + 1], that of its own last observation; a terminated one does not.
    """
    advantages = rewards + gamma * values[1:] * (1 - terminations) - values[:-1]
    decay = gamma * gae_lambda * (1 - dones[1:])
    # fast: A[t] = delta[t] + decay[t] A[t + 1] by doubling, log2(T) rounds instead of T: after each, row t holds the
    # sum of its next `span` deltas. A quarter of the loop's time on a CPU.
    span = 1
    while span < len(rewards):
        advantages = advantages + decay * F.pad(advantages[span:], (0, 0, 0, span))
        decay = decay * F.pad(decay[span:], (0, 0, 0, span))
        span *= 2
    return advantages


def evaluate_actions(agent: Agent, obs, actions):
    """Log-probabilities of actions [batch] int64 at obs, the entropy of the policy there, and values; each [batch]."""
    logits, values = agent(obs)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy, values


def sum_over_ranks(x) -> None:
    """Replace x, a tensor on the rank's device, by its sum over all ranks, the same bits on each."""
    if dist.is_initialized():
        with contact():
            dist.all_reduce(x)


def joint_statistics(advantages, valid, permutations, num_minibatches: int, sum_over_ranks):
    """Of every minibatch, joined over all ranks: how many rows count, mean and standard deviation of their advantages.

    advantages, valid: [batch_size] of this rank, permutations: [update_epochs, batch_size]; all that one all_reduce of
    the sums needs is known before the first minibatch. Returns [update_epochs * num_minibatches, 3].
    """
    mb_valid, mb_advantages = (
        x[permutations].double().view(len(permutations) * num_minibatches, -1) for x in (valid, advantages)
    )
    terms = torch.ones_like(mb_valid), mb_advantages, mb_advantages.square()
    sums = torch.stack([(mb_valid * x).sum(-1) for x in terms])
    sum_over_ranks(sums)
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    std = (sums[2] / count - mean.square()).clamp(min=0).sqrt()
    return torch.stack([count, mean, std], -1).float()


def joint_ppo_loss(
    agent: Agent, args: Args, obs, actions, logprobs, values, advantages, returns, valid, statistics
):  # fmt: skip
    """This rank's part of the clipped surrogate loss (Schulman et al. 2017, equations 7 and 9) and its first 6 METRICS.

    The sum of the ranks' parts is what one process has on the joined minibatch, of which `statistics` [3] are known.
    Every other argument is [minibatch_size, ...]; `valid` is 1 in rows that count and 0 in reset rows.
    """
    count, mean, std = statistics
    weights = valid / count
    newlogprob, entropy, newvalue = evaluate_actions(agent, obs, actions)
    logratio = newlogprob - logprobs
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    if args.norm_adv:
        advantages = (advantages - mean) / (std + 1e-8)
    surrogate = torch.min(advantages * ratio, advantages * clipped)

    v_error = (newvalue - returns).square()
    if args.clip_vloss:
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (v_clipped - returns).square())

    # approx_kl: http://joschu.net/blog/kl-approx.html
    terms = [-surrogate, 0.5 * v_error, entropy, -logratio, ratio - 1 - logratio, (clipped != ratio).float()]
    metrics = torch.stack(terms) @ weights  # the mean of each over the rows that count
    return metrics[0] + args.vf_coef * metrics[1] - args.ent_coef * metrics[2], metrics.detach()


def flat_gradients(loss_fn: Callable, params: tuple, *inputs):
    """Of the loss that loss_fn(*inputs) returns with its metrics: gradient and metrics in a row, for one all_reduce."""
    loss, metrics = loss_fn(*inputs)
    return torch.cat([*(grad.flatten() for grad in torch.autograd.grad(loss, params)), metrics])


def clip_gradients(flat, params: tuple, max_grad_norm: float):
    """Of what flat_gradients returned: the gradient for each of `params`, all together cut to a norm of max_grad_norm,
    and the metrics with the norm before the cut appended.
    """
    *grads, metrics = flat.split([*(param.numel() for param in params), len(METRICS) - 1])
    grads = [grad.view(param.shape) for grad, param in zip(grads, params)]
    grad_norm = torch.stack([grad.norm() for grad in grads]).norm()
    scale = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
    # each with the strides of its parameter: a fused optimizer takes the two for alike without looking
    grads = [torch.empty_like(param).copy_(grad * scale) for grad, param in zip(grads, params)]
    return grads, torch.cat([metrics, grad_norm[None]])


def update(
    agent: Agent, optimizer, rollout: Rollout, args: Args, metrics, gae=gae, evaluate_actions=evaluate_actions,
    flat_gradients=flat_gradients, clip_gradients=clip_gradients, sum_over_ranks=sum_over_ranks,
) -> None:  # fmt: skip
    """The learning phase: targets, then update_epochs passes over the rollout; `metrics` gets the means of METRICS."""
    rollout.obs[-1].copy_(blocks(rollout.host_obs.to(rollout.obs.device, non_blocking=True)))
    rollout.rewards.copy_(rollout.host_rewards, non_blocking=True)
    rollout.terminations.copy_(rollout.host_terminations, non_blocking=True)
    rollout.dones.copy_(rollout.host_dones, non_blocking=True)

    with torch.no_grad():
        # fast: one batched pass here, instead of a value and a log-probability computed and stored at every step
        b_obs, b_actions, size = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten(), args.minibatch_size
        passes = [evaluate_actions(agent, *chunk) for chunk in zip(b_obs.split(size), b_actions.split(size))]
        b_logprobs = torch.cat([logprobs for logprobs, _, _ in passes])
        b_values = torch.cat([values for _, _, values in passes])
        values = torch.cat([b_values, agent.value(rollout.obs[-1])]).view(-1, args.num_envs)
        advantages = gae(rollout.rewards, values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda)
        b_advantages = advantages.flatten()
        b_returns = b_advantages + b_values
        b_valid = 1 - rollout.dones[:-1].flatten()  # the action of a reset row did nothing
        batch = b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns, b_valid
        shuffled = rollout.permutations, args.num_minibatches
        statistics = iter(joint_statistics(b_advantages, b_valid, *shuffled, sum_over_ranks))

    params = tuple(agent.parameters())
    metrics.zero_()
    for permutation in rollout.permutations:
        # fast: index_select copies whole stacks of pictures, where indexing goes from pixel to pixel
        for minibatch in zip(*(x.index_select(0, permutation).split(size) for x in batch)):
            flat = flat_gradients(joint_ppo_loss, params, agent, args, *minibatch, next(statistics))
            sum_over_ranks(flat)
            grads, mb_metrics = clip_gradients(flat, params, args.max_grad_norm)
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
            metrics += mb_metrics
    metrics /= args.update_epochs * args.num_minibatches


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


def capture_pieces(step, state) -> Callable:
    """capture, for a step that takes a `sum_over_ranks` which no graph can hold: a graph up to each of its calls, and
    after the last; returns the replay of them, with the sums in between.
    """
    stream, pool, pieces = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(step, state)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.compiler.set_stance("fail_on_recompile"), ExitStack() as recording:

        def record():
            pieces.append((graph := torch.cuda.CUDAGraph()).replay)
            recording.enter_context(torch.cuda.graph(graph, pool=pool, stream=stream))

        def cut(x):
            recording.close()
            pieces.append(partial(sum_over_ranks, x))
            record()

        record()
        step(sum_over_ranks=cut)

    def replay():
        for piece in pieces:
            piece()

    return replay


def capture_learning(learn, state) -> Callable:
    """The replay of `learn`: one graph, the sums over ranks within, if NCCL is there and puts up with it on every rank;
    else pieces.
    """
    if not dist.is_initialized():
        return capture([learn], state)[0]
    replay, refused = None, "cuda:nccl" not in dist.get_backend_config()
    if not refused:
        try:
            replay = capture([partial(learn, sum_over_ranks=dist.all_reduce)], state)[0]
        except RuntimeError as error:
            refused = True
            tqdm.write(f"the all_reduce stays outside the CUDA graphs: {str(error).splitlines()[0]}", file=sys.stderr)
    return capture_pieces(learn, state) if largest_over_ranks(refused)[0] else replay


def accelerate(mode: str, agent: Agent, optimizer, rollout: Rollout, args: Args, metrics) -> tuple[list, Callable]:
    """The steps of acting, one for each row of the rollout, and the learning phase, bound to their tensors.

    Every mode runs the same functions: leave out all that follows an `if`, and eager mode remains.
    """
    sample_fn, update_fns = sample_actions, (gae, evaluate_actions, flat_gradients, clip_gradients)
    if "compile" in mode:
        # fast: loss, gradients and their norm in one piece take 40 % off a CPU's update of 4 x 128 steps of CartPole
        torch._dynamo.config.trace_autograd_ops = True
        update_fns = [torch.compile(f, fullgraph=True, dynamic=False) for f in update_fns]
    if "compile" in mode and metrics.is_cuda:  # on a CPU, calling a compiled policy costs more than it saves
        sample_fn = torch.compile(sample_actions, fullgraph=True, dynamic=False)

    rows = zip(rollout.obs, rollout.gumbel, rollout.actions)
    acts = [partial(act_step, agent, rollout.host_obs, *row, rollout.host_actions, sample_fn) for row in rows]
    learn = partial(update, agent, optimizer, rollout, args, metrics, *update_fns)

    def trained():
        return [*agent.parameters(), *(x for state in optimizer.state.values() for x in state.values())]

    if mode == "compile":
        warm_up(acts[0], state=list)
        warm_up(learn, state=trained)
    if "cudagraphs" in mode:
        return capture(acts, state=list), capture_learning(learn, state=trained)
    return acts, learn


# ---- ranks -----------------------------------------------------------------------------------------------------------


def join_ranks() -> None:
    """Meet the other ranks, if torchrun or its like started this process as one, and watch them from then on."""
    if "RANK" not in os.environ:
        return
    late = threading.Timer(MEETING, lost, [f"they did not all start within {MEETING} seconds"])
    late.daemon = True
    late.start()
    with contact():
        store, rank, ranks = meet()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        # the time limit is for a rank that lives and hangs: others may wait for one that compiles
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(hours=1))
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
    late.cancel()
    watch = threading.Thread(target=watch_ranks, args=[group], daemon=True)
    watch.start()
    atexit.register(lambda: (ENDING.set(), watch.join()))  # Python must not end while its thread is in there


def meet():
    """The store through which the ranks find each other, this one's number and how many there are.

    torchrun's store outlives a restart, and still has the addresses of the processes before. So every process signs in
    with a new name, and those that all read the same list of names go on in a part of the store that is called by it.
    """
    store, rank, ranks = next(dist.rendezvous("env://"))
    store.set(f"name {rank}", uuid.uuid4().hex)
    while True:
        names = " ".join(store.get(f"name {n}").decode() for n in range(ranks))
        store.set(f"names read by {rank}", names)
        if all(store.get(f"names read by {n}").decode() == names for n in range(ranks)):
            return dist.PrefixStore(names, store), rank, ranks
        time.sleep(0.05)


def watch_ranks(group) -> None:
    """End this process when another one died or is out of reach: the work of a thread, whatever the others wait for.

    A captured all_reduce has no time limit, and a cut cable closes no connection: only silence tells.
    """
    try:
        while not ENDING.is_set():
            dist.all_reduce(torch.zeros(1), group=group)
            ENDING.wait(BEAT)
    except (RuntimeError, ValueError) as error:
        if not ENDING.wait(2):  # an end in good order closes connections too
            lost(error)


def lost(reason) -> None:
    """End this process with a sentence; at once, since an orderly end could wait for the lost rank for ever."""
    who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    why = re.sub(r"\[/\S+\] ", "", str(reason)).splitlines()[0].split(". ")[0]  # without a place in torch's sources
    tqdm.write(f"error: {who} lost contact with another: {why}", file=sys.stderr)
    end_at_once(1)


def end_at_once(status: int) -> None:
    """End this process without anything that may take time: torchrun kills the others soon after the first one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def contact():
    """What fails in here is the contact with other ranks."""
    try:
        yield
    except RuntimeError as error:
        lost(error)


def leave_ranks() -> None:
    """Part from the other ranks once all have come here; afterwards this process is rank 0 of 1.

    A sum that waits on a closed connection fails even if all of it has arrived. So none is closed before every rank has
    its last sum and its watch is told; and rank 0, whose process may keep the store, goes last.
    """
    if not dist.is_initialized():
        return
    rank, ranks = rank_and_size()
    largest_over_ranks(0)
    ENDING.set()
    store, patience = dist.distributed_c10d._get_default_store(), timedelta(seconds=PATIENCE)
    with contact():
        store.set(f"leaving {rank}", "")
        store.wait([f"leaving {n}" for n in range(ranks)], patience)
        store.set(f"gone {rank}", "")
        if rank == 0:
            store.wait([f"gone {n}" for n in range(ranks)], patience)
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; one on its own is rank 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_0(function: Callable, *arguments, everywhere: bool = False):
    """What function(*arguments) returns on rank 0, on every rank; with `everywhere` the others then call it themselves.

    If it ends rank 0, it ends all with the same status, and only rank 0 has said why.
    """
    if not dist.is_initialized():
        return function(*arguments)
    result, status = None, None
    if dist.get_rank() == 0:
        try:
            result = function(*arguments)
        except SystemExit as end:
            status = end.code or 0
    outcome = [None if everywhere else result, status]
    with contact():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        end_at_once(outcome[1])
    if dist.get_rank() == 0:
        return result
    return function(*arguments) if everywhere else outcome[0]


def largest_over_ranks(*numbers: int) -> list[int]:
    """Of each number the largest that any rank gave."""
    if dist.is_initialized():
        with contact():
            dist.all_reduce(largest := torch.tensor(numbers), dist.ReduceOp.MAX)
        return largest.tolist()
    return [*numbers]


def collect_on_rank_0(rows: list) -> list:
    """The rows of all ranks on rank 0, none on the others."""
    if not dist.is_initialized():
        return rows
    parts = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    with contact():
        dist.gather_object(rows, parts)
    return [row for part in parts or [] for row in part]


def equal_on_all_ranks(tensors) -> bool:
    """Whether these tensors of float32 are the same on every rank, by the sum of their bits read as whole numbers."""
    bits = sum(int(x.detach().view(torch.int32).sum()) for x in tensors)
    largest, smallest = largest_over_ranks(bits, -bits)
    return largest == -smallest


def device_of_rank(args: Args, device: torch.device) -> torch.device:
    """The CPU, or of several ranks on a machine each the GPU with its number there."""
    local_rank, ranks = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device.type == "cpu" or not dist.is_initialized() or ranks == 1:
        return device
    if ":" in args.device:
        fail(f"--device {args.device}: every rank takes a GPU of its own, so it has to be cuda")
    if ranks > torch.cuda.device_count():
        fail(f"--device {args.device}: {ranks} ranks were started on a machine with {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", local_rank)


def settle_run_dir(run_dir: Path, new: bool) -> tuple[Path, bool]:
    """The folder of the run, and whether torchrun has started the job before, so that this start is to go on with it.

    The folder's name is kept where it outlives the ranks, in the store that torchrun has for their meeting; a folder
    that a `new` run must not use never gets there.
    """
    store, again = None, False
    if dist.is_torchelastic_launched():
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        again = store.check(["run_dir"])
    if again:
        return Path(store.get("run_dir").decode()), True
    if new and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        fail(f"--run-dir {run_dir}: is not an empty folder; to go on with a run, name it with --resume")
    if store:
        store.set("run_dir", str(run_dir))
    return run_dir, False


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
    """End with a sentence if sizes do not fit together, or not to the number of ranks."""
    if args.batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: does not divide num_envs x num_steps = {args.batch_size}")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: less than num_envs x num_steps = {args.batch_size}")
    ranks = rank_and_size()[1]
    if args.num_envs % ranks:
        fail(f"--num-envs {args.num_envs}: cannot be shared out equally to {ranks} ranks")
    if args.batch_size // ranks % args.num_minibatches:
        share = f"a rank's share of num_envs x num_steps = {args.batch_size // ranks}"
        fail(f"--num-minibatches {args.num_minibatches}: does not divide {share}")


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
    """Train, evaluate and summarise one agent; returns the content of summary.json. A `stop` that fills up ends it.

    Ranks other than 0 leave after training and return nothing; `stop` is to be a list where there are several.
    """
    started = time.perf_counter()
    device, mode = from_rank_0(check_args, args, everywhere=True)
    device = from_rank_0(device_of_rank, args, device, everywhere=True)
    rank, ranks = rank_and_size()
    cores = max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    agent_name, saved_dir = Path(__file__).stem, args.resume or args.evaluate
    default_dir = f"runs/{args.env_id}__{agent_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(saved_dir or args.run_dir or default_dir)
    run_dir, again = from_rank_0(settle_run_dir, run_dir, not saved_dir)
    if again and not saved_dir:
        args = replace(args, run_dir=str(run_dir), resume=str(run_dir))
    own = replace(args, num_envs=args.num_envs // ranks, env_threads=args.env_threads or cores)  # this rank's share

    # ---- seed and build ----
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or (cores if device.type == "cpu" else 1))
    torch.set_flush_denormal(True)  # fast: dead units leave Adam denormals, which a CPU is 13 times as slow with
    torch.backends.cudnn.benchmark = True
    # not by the newer fp32_precision: while that is set, torch.compile stumbles over its own reading of the older flags
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.set_float32_matmul_precision("highest" if args.precision == "fp32" or device.type == "cpu" else "high")
    bf16_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 = args.precision == "bf16" or (args.precision == "auto" and bf16_cpu)
    flag = "--evaluate" if args.evaluate else "--resume"
    checkpoint = {"global_step": 0, "wall_seconds": 0.0, "returns": []}
    # else killed before the first one
    saved = from_rank_0(lambda: args.evaluate or (args.resume and (run_dir / "checkpoint.pt").exists()))
    if saved:
        checkpoint = from_rank_0(load_checkpoint, run_dir, flag)  # the other machines need not see the folder
    global_step, returns = checkpoint["global_step"], deque(checkpoint["returns"], maxlen=100)
    env_seed = (args.seed * 10_000 + global_step) % 2**30  # far from other seeds' environments, and new after a resume
    env_seed += rank * own.num_envs
    envs = from_rank_0(make_envs, own, 1 if args.evaluate else own.num_envs, env_seed, everywhere=True)
    agent = Agent(int(envs.single_action_space.n), bf16)
    agent.load_state_dict(from_rank_0(agent.state_dict))  # another processor may have made others of the same seed
    agent = agent.to(device, memory_format=torch.channels_last)
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=True, capturable=device.type == "cuda")
    if saved:
        from_rank_0(restore, checkpoint, f"{flag} {run_dir}", agent, optimizer, generator, everywhere=True)
        lr = optimizer.param_groups[0]["lr"]
    if rank:  # the noise of its own, and after a resumption other noise than before; rank 0 goes on with its own
        generator.manual_seed(int(np.random.SeedSequence((args.seed, rank, global_step)).generate_state(1)[0]))
    if not equal_on_all_ranks(agent.parameters()):
        from_rank_0(fail, "the ranks do not start with the same parameters", 1)
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    summary |= {"ranks": ranks}
    if args.evaluate:
        leave_ranks()
        if rank:
            return {}
        return summary | final_score(args, agent, device, run_dir, stop) | {"run_dir": str(run_dir)}

    def wall_seconds():
        return checkpoint["wall_seconds"] + time.perf_counter() - started

    def save():
        if rank:
            return
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "returns": list(returns)}
        state |= {"generator": generator.get_state(), "device": device.type}
        torch.save(state | {"global_step": global_step, "wall_seconds": wall_seconds()}, content := io.BytesIO())
        write_file(run_dir / "checkpoint.pt", content.getbuffer())

    def begin():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--run-dir {run_dir}: cannot be made ({error.strerror})")
        write_json(run_dir / "config.json", {"agent": agent_name, "args": asdict(args)})
        write_file(run_dir / Path(__file__).name, Path(__file__).read_bytes())
        save()

    from_rank_0(begin)
    if args.track and rank == 0:
        import wandb

        wandb.init(project="redline", name=run_dir.name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1, flush_secs=30) if rank == 0 else None

    rollout, metrics = Rollout(own, envs, device), torch.zeros(len(METRICS), device=device)
    clock = time.perf_counter()
    acts, learn = accelerate(mode, agent, optimizer, rollout, own, metrics)
    compile_seconds = time.perf_counter() - clock

    # ---- the loop ----
    host_obs, host_actions, host_rewards, host_terminations, host_dones = (
        getattr(rollout, f"host_{name}").numpy() for name in ("obs", "actions", "rewards", "terminations", "dones")
    )
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True, disable=rank > 0)  # fmt: skip
    host_obs[:], _ = envs.reset()
    dones = np.zeros(own.num_envs, dtype=bool)
    running, finished = np.zeros((2, own.num_envs)), []  # returns and lengths of games under way; those of ended ones
    first, last = math.ceil(global_step / args.batch_size) + 1, args.num_iterations
    log_every, saved_at = max(1, last // 1000), time.perf_counter()
    speeds = dict.fromkeys(("sps", "sps_rollout", "sps_update"))
    for iteration in range(first, last + 1):
        if iteration <= first + 1:  # SPS counts from the second iteration on: the first warms up what is left
            rollout_seconds, update_seconds, loop_start, loop_step = 0.0, 0.0, time.perf_counter(), global_step
        if args.anneal_lr:
            lr.fill_(args.learning_rate * (1 - (iteration - 1) / last))
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
        learn()
        if arrived:
            torch.cuda.synchronize(device)  # for the clock: nothing is held up that could go on without the update
        update_seconds += time.perf_counter() - clock

        global_step += args.batch_size
        progress.update(args.batch_size)
        due = time.perf_counter() - saved_at > 60 * args.checkpoint_minutes
        signalled, due = largest_over_ranks(stop[0] if stop else 0, due)  # all stop, and save, after the same iteration
        if signalled and not stop:
            stop.append(signalled)
        stopping = iteration == last or bool(stop)
        saving = stopping or bool(due)
        if saving or iteration % log_every == 0:
            losses, finished = dict(zip(METRICS, metrics.tolist())), collect_on_rank_0(finished)
            if not all(map(math.isfinite, losses.values())):
                progress.close()
                if rank:
                    sys.exit(1)  # rank 0 says why
                writer.close()
                fail(f"the loss is not finite any more at step {global_step}: {losses}. A lower --learning-rate may "
                     f"help; {run_dir}/checkpoint.pt is from before", status=1)  # fmt: skip
            if saving and not equal_on_all_ranks(agent.parameters()):
                from_rank_0(fail, f"at step {global_step} parameters differ between ranks, by a fault of theirs; "
                                  f"{run_dir}/checkpoint.pt is from before", 1)  # fmt: skip
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
                for tag, value in scalars.items() if writer else ():
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
    del learn  # NCCL parts only once no graph holds its collectives any more
    leave_ranks()
    if rank:
        return {}
    writer.close()

    # ---- score and summary ----
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
        join_ranks()
        result = main(from_rank_0(parse_args), signals)
    except (OSError, torch.OutOfMemoryError) as error:
        fail(str(error).splitlines()[0], status=1)
    if result:
        print(json.dumps(result))
    sys.exit(128 + signals[0] if signals else 0)
