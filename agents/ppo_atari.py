# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[atari]==1.4.0",
#     "envpool==1.2.5",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "pillow==13.0.0",
# ]
# ///
"""Proximal policy optimisation (PPO) on Atari, from pixels. Schulman et al. 2017, https://arxiv.org/abs/1707.06347

    python agents/ppo_atari.py --env-id Breakout-v5 --seed 1

The defaults are the paper's Atari settings. Differs from the paper in
- the value loss is clipped, weights start orthogonal and Adam's epsilon is 1e-5, as in its published code;
- an episode cut off by the time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of every loss;
- logged and evaluated returns are those of whole games, unclipped, however the agent is trained.
"""

import difflib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import envpool
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")


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
    """folder for everything that the run leaves behind (default: runs/<env>__<agent>__<seed>__<time>)"""
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
    wandb_project: str = "redline"
    """Weights & Biases project that --track writes to"""

    # ---- Environment ----
    env_id: str = "Pong-v5"
    """name of the environment in envpool"""
    num_envs: int = 8
    """environments stepped together"""
    frame_skip: int = 4
    """frames that one action is held for"""
    sticky_actions: float = 0.0
    """probability that the previous action is repeated (Machado et al. 2018 recommend 0.25)"""
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
    """arithmetic of the convolutions: auto is tf32 on CUDA, bf16 on CPUs with AVX512-BF16, fp32 elsewhere"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# ---------------------------------------------------------------------------------------------------- environments


class EnvPool:
    """An envpool behind the five-value `step` of a gymnasium vector environment with next-step autoreset.

    The step after the end of an episode ignores its action and returns the first observation of the next one with
    reward 0; the observation of the ending step itself is the episode's last. `infos` holds all that envpool reports.
    """

    def __init__(self, pool):
        self.pool, self.keys = pool, pool._state_keys
        self.num_envs = pool.num_envs
        self.single_observation_space = pool.single_observation_space
        self.single_action_space = pool.single_action_space
        self.env_ids = np.arange(self.num_envs, dtype=np.int32)

    def reset(self):
        """Observations [num_envs, ...] of fresh episodes, and infos."""
        return self.pool.reset()

    def step(self, actions):
        """Take actions [num_envs] int32; returns obs, rewards, terminations, truncations and infos, a row per env."""
        # fast: envpool's own `step` spends three times as long as four CartPoles on building nested dictionaries
        self.pool._send([self.env_ids, self.env_ids, actions])
        infos = dict(zip(self.keys, self.pool._recv()))
        truncations = infos["trunc"]
        return infos["obs"], infos["reward"], infos["done"] & ~truncations, truncations, infos

    def render(self):
        """The picture [height, width, 3] uint8 of the first environment."""
        return self.pool.render()[0]


def make_envs(args: Args, num_envs: int, seed: int, render: bool = False) -> EnvPool:
    """Atari games: observations [num_envs, 4, 84, 84] uint8, the last four grey pictures of each game."""
    try:
        pool = envpool.make(
            args.env_id,
            env_type="gymnasium",
            num_envs=num_envs,
            num_threads=min(num_envs, args.env_threads or cpu_cores()),
            seed=seed,
            frame_skip=args.frame_skip,
            max_episode_steps=108_000 // args.frame_skip,  # 30 minutes of play at 60 frames a second
            repeat_action_probability=args.sticky_actions,
            full_action_space=args.full_action_space,
            episodic_life=args.episodic_life,
            reward_clip=args.clip_reward,
            **({"render_mode": "rgb_array"} if render else {}),
        )
    except TypeError:
        fail(f"--env-id {args.env_id}: not an Atari game; this agent plays Atari, for example Pong-v5")
    return EnvPool(pool)


def true_game(rewards, terminations, truncations, infos):
    """The game's own rewards [num_envs] and whether a game is over [num_envs], however training shapes them."""
    return infos["info:reward"], (infos["info:terminated"] != 0) | truncations


# --------------------------------------------------------------------------------------------------------- network


def layer_init(layer, std=2**0.5):
    """Orthogonal weights of gain `std`, biases zero."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The convolutional network of Mnih et al. 2015 (Nature 518) with a policy head and a value head."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.trunk = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(512, 1), std=1)

    def hidden(self, obs):
        # fast: channels_last halves the time of the convolutions on a CPU
        pixels = obs.to(torch.bfloat16 if self.bf16 else torch.float32, memory_format=torch.channels_last) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.trunk(pixels).float()

    def policy(self, obs):
        """Logits [batch, num_actions] for obs [batch, 4, 84, 84] uint8."""
        return self.actor(self.hidden(obs))

    def value(self, obs):
        """Values [batch] for obs [batch, 4, 84, 84] uint8."""
        return self.critic(self.hidden(obs)).squeeze(-1)

    def forward(self, obs):
        """Logits [batch, num_actions] and values [batch]."""
        hidden = self.hidden(obs)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- algorithm


class Rollout:
    """The data of one iteration, allocated once and only ever written in place: captured graphs know its addresses.

    Rows are time, columns environments. `host_*` tensors are the ends that numpy and envpool touch: pinned memory
    where the device is a GPU, the very same tensor as its twin where it is the CPU.
    """

    def __init__(self, args: Args, envs, device: torch.device):
        def twins(*shape, dtype=torch.float32):
            host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
            return host, host.to(device)

        T, N = args.num_steps, args.num_envs
        obs_space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
        obs_dtype = torch.uint8 if obs_space.dtype == np.uint8 else torch.float32
        # obs[t] came with dones[t]; actions[t], taken there, brought rewards[t] and terminations[t]
        self.obs = torch.zeros(T + 1, N, *obs_space.shape, dtype=obs_dtype, device=device)
        self.actions = torch.zeros(T, N, dtype=torch.int64, device=device)
        self.host_rewards, self.rewards = twins(T, N)
        self.host_terminations, self.terminations = twins(T, N)
        self.host_dones, self.dones = twins(T + 1, N)
        self.host_obs, self.next_obs = twins(N, *obs_space.shape, dtype=obs_dtype)
        self.host_actions, self.next_actions = twins(N, dtype=torch.int32)
        self.gumbel = torch.zeros(T, N, num_actions, device=device)
        self.permutations = torch.zeros(args.update_epochs, T * N, dtype=torch.int64, device=device)
        self.t = torch.zeros(1, dtype=torch.int64, device=device)  # the row that the next step writes


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration: Gumbel noise for its actions and the order of its minibatches.

    Drawn here, outside everything compiled or captured, it is the same in every mode, and no graph can freeze it.
    """
    rollout.gumbel.exponential_(generator=generator).log_().neg_()
    for permutation in rollout.permutations:
        torch.randperm(len(permutation), generator=generator, out=permutation)


def policy_step(agent: Agent, rollout: Rollout) -> None:
    """Choose actions for next_obs and write both into row t; argmax(logits + Gumbel noise) samples the policy."""
    t = rollout.t
    actions = (agent.policy(rollout.next_obs) + rollout.gumbel.index_select(0, t)).argmax(-1)
    rollout.obs.index_copy_(0, t, rollout.next_obs[None])
    rollout.actions.index_copy_(0, t, actions)
    rollout.next_actions.copy_(actions[0])
    t.add_(1)


@torch.no_grad()
def act_step(agent: Agent, rollout: Rollout, policy_step=policy_step) -> None:
    """One step of acting: host_obs to the device, policy_step there, and its actions back to host_actions."""
    rollout.next_obs.copy_(rollout.host_obs, non_blocking=True)
    policy_step(agent, rollout)
    rollout.host_actions.copy_(rollout.next_actions, non_blocking=True)


def gae(rewards, values, terminations, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16).

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
    """Log-probabilities [batch] of actions [batch] int64 under the policy at obs, the entropy there, and values."""
    logits, values = agent(obs)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy, values


def ppo_loss(agent: Agent, args: Args, obs, actions, logprobs, values, advantages, returns, valid):
    """The clipped surrogate loss over a minibatch, all arguments [minibatch_size, ...], and its METRICS [6].

    Schulman et al. 2017, equations 7 and 9. `valid` is 1 for rows that count and 0 for reset rows.
    """
    weights = valid / valid.sum().clamp(min=1)
    newlogprob, entropy, newvalue = evaluate_actions(agent, obs, actions)
    logratio = newlogprob - logprobs
    ratio = logratio.exp()

    if args.norm_adv:
        advantages = advantages - (advantages * weights).sum()
        advantages = advantages / ((advantages.square() * weights).sum().sqrt() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -(torch.min(advantages * ratio, advantages * clipped) * weights).sum()

    v_error = (newvalue - returns).square()
    if args.clip_vloss:
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (v_clipped - returns).square())
    v_loss = 0.5 * (v_error * weights).sum()

    entropy = (entropy * weights).sum()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        old_approx_kl = (-logratio * weights).sum()
        approx_kl = ((ratio - 1 - logratio) * weights).sum()
        clipfrac = (((ratio - 1).abs() > args.clip_coef) * weights).sum()
    return loss, torch.stack([pg_loss, v_loss, entropy, old_approx_kl, approx_kl, clipfrac]).detach()


def update(agent: Agent, optimizer, rollout: Rollout, args: Args, metrics, gae, evaluate_actions, ppo_loss) -> None:
    """The learning phase: targets, then update_epochs passes over the rollout; `metrics` gets the means of METRICS."""
    rollout.t.zero_()
    rollout.obs[-1].copy_(rollout.host_obs, non_blocking=True)
    rollout.rewards.copy_(rollout.host_rewards, non_blocking=True)
    rollout.terminations.copy_(rollout.host_terminations, non_blocking=True)
    rollout.dones.copy_(rollout.host_dones, non_blocking=True)
    b_obs, b_actions = rollout.obs[:-1].flatten(0, 1), rollout.actions.flatten()

    with torch.no_grad():
        # fast: one batched pass here, instead of a value and a log-probability computed and stored at every step
        size = args.minibatch_size
        passes = [evaluate_actions(agent, *chunk) for chunk in zip(b_obs.split(size), b_actions.split(size))]
        b_logprobs = torch.cat([logprobs for logprobs, _, _ in passes])
        b_values = torch.cat([values for _, _, values in passes])
        values = torch.cat([b_values, agent.value(rollout.obs[-1])]).view(-1, args.num_envs)
        advantages = gae(rollout.rewards, values, rollout.terminations, rollout.dones, args.gamma, args.gae_lambda)
        b_advantages = advantages.flatten()
        b_returns = b_advantages + b_values
        # the action of a reset row was ignored: nothing is to be learnt from it
        b_valid = 1 - rollout.dones[:-1].flatten()

    metrics.zero_()
    for permutation in rollout.permutations:
        for mb in permutation.split(args.minibatch_size):
            loss, mb_metrics = ppo_loss(
                agent, args, b_obs[mb], b_actions[mb], b_logprobs[mb], b_values[mb], b_advantages[mb], b_returns[mb],
                b_valid[mb],
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            metrics[:-1] += mb_metrics
            metrics[-1] += grad_norm
    metrics /= args.update_epochs * args.num_minibatches


# ----------------------------------------------------------------------------------------------------------- speed


def warm_up(step, state):
    """Call `step` until all is compiled, tuned and allocated, put back every tensor that `state()` lists, return it."""
    before = {id(x): x.clone() for x in state()}
    for _ in range(3):
        step()
    with torch.no_grad():
        for x in state():  # what the warm-up itself created is optimizer state, which starts at zero
            x.copy_(before[id(x)]) if id(x) in before else x.zero_()
    return step


def trained_tensors(agent: nn.Module, optimizer) -> list[torch.Tensor]:
    """All that a call of `update` changes for good."""
    return [*agent.parameters(), *(x for state in optimizer.state.values() for x in state.values())]


def capture(step, state):
    """Record one call of `step` as a CUDA graph and return the function that replays it.

    The contract of `step`: fixed shapes, no branch of the host on a tensor, no allocation of pinned memory, and
    everything that outlives the call is changed in place. What varies between calls is read from tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(step, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.compiler.set_stance("fail_on_recompile"), torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def use_precision(precision: str, device: torch.device) -> bool:
    """Set the arithmetic of float32 products on CUDA; returns whether the network is to run under bf16 autocast."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee" if precision == "fp32" else "tf32"
    fast_on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16" or (precision == "auto" and fast_on_cpu)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------------- command line and run folder


def fail(message: str, status: int = 2):
    """End the process with one sentence on stderr: status 2 for bad input, 1 for a failure while running."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


class StopSignal:
    """Notes the first SIGINT or SIGTERM in `number`, for the loop to end in order; a second one ends it at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line; with --resume or --evaluate, the settings of that run are the defaults."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    run_dir = args.resume or args.evaluate
    if run_dir is None:
        return args
    flag = "--resume" if args.resume else "--evaluate"
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())
        agent, saved = saved["agent"], Args(**saved["args"])
    except FileNotFoundError:
        fail(f"{flag} {run_dir}: no run is there (its config.json is missing)")
    except (ValueError, KeyError, TypeError, OSError) as error:
        fail(f"{flag} {run_dir}: its config.json cannot be used by this agent ({error})")
    if agent != Path(__file__).stem:
        fail(f"{flag} {run_dir}: that is a run of {agent}, this is {Path(__file__).stem}")
    saved.resume = saved.evaluate = None
    saved.run_dir = run_dir
    return tyro.cli(Args, args=argv, description=__doc__, default=saved)


def check_args(args: Args) -> tuple[torch.device, str]:
    """The device and the mode to use; ends with a sentence about the first flag that cannot be meant."""
    ids = envpool.list_all_envs()
    if args.env_id not in ids:
        near = difflib.get_close_matches(args.env_id, ids, n=3, cutoff=0.4)
        fail(f"--env-id {args.env_id}: envpool has no such environment; nearest: {', '.join(near) or 'none'}")
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "frame_skip"):
        if getattr(args, name, 1) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("learning_rate", "max_grad_norm", "clip_coef"):
        if not getattr(args, name) > 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    for name in ("gamma", "gae_lambda", "sticky_actions"):
        if not 0 <= getattr(args, name, 0) <= 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between 0 and 1")
    for name in ("seed", "eval_episodes", "checkpoint_minutes", "torch_threads", "env_threads"):
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be negative")
    if args.batch_size % args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: does not divide num_envs x num_steps = {args.batch_size}")
    if args.total_timesteps < args.batch_size:
        fail(f"--total-timesteps {args.total_timesteps}: less than num_envs x num_steps = {args.batch_size}")

    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", args.device):
        fail(f"--device {args.device}: must be auto, cpu, cuda or cuda:N")
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(fastest if args.device == "auto" else args.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use")
    mode = args.mode if args.mode != "auto" else "compile-cudagraphs" if device.type == "cuda" else "eager"
    if "cudagraphs" in mode and device.type != "cuda":
        fail(f"--mode {mode}: CUDA graphs need a CUDA device, and --device is {device}")
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
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def save_checkpoint(run_dir: Path, checkpoint: dict) -> None:
    """Write checkpoint.pt: by way of memory, for torch.save cannot report a full disk in one piece."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_file(run_dir / "checkpoint.pt", content.getvalue())


def load_checkpoint(run_dir: Path, device: torch.device) -> dict:
    """Read a run's checkpoint.pt onto the device."""
    try:
        return torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"{run_dir}: the run ended before its first checkpoint; start it again")
    except Exception as error:  # torch.load raises whatever the bytes lead it into
        fail(f"{run_dir}: its checkpoint.pt is damaged or no checkpoint ({str(error).splitlines()[0]})")


def restore(checkpoint: dict, agent: nn.Module, optimizer, generator: torch.Generator) -> None:
    """Put parameters, optimizer state and the random number generator back to where a checkpoint left them."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        for group, saved in zip(optimizer.param_groups, checkpoint["optimizer"]["param_groups"], strict=True):
            saved |= {key: group[key] for key in ("lr", "fused", "capturable")}  # this device's, not the checkpoint's
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["device"] == generator.device.type:
            generator.set_state(checkpoint["generator"].cpu())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"the checkpoint is not one of this agent on this environment ({str(error).splitlines()[0]})")


class Episodes:
    """Puts whole games together from rollouts that cut them anywhere."""

    def __init__(self, num_envs: int):
        self.running = np.zeros((2, num_envs))

    def add(self, rewards, resets, overs) -> list[tuple[float, float]]:
        """Returns and lengths of the games that ended in a rollout of rewards, reset rows and game ends [T, N]."""
        totals = self.running[:, None] + np.stack([rewards, 1 - resets]).cumsum(1, dtype=np.float64)
        counted = np.zeros_like(self.running)
        finished = []
        for t, n in np.argwhere(overs):
            finished.append(tuple((totals[:, t, n] - counted[:, n]).tolist()))
            counted[:, n] = totals[:, t, n]
        self.running = totals[:, -1] - counted
        return finished


class Logger:
    """The progress line on stderr, the TensorBoard curves and, with --track, their mirror at Weights & Biases."""

    def __init__(self, args: Args, run_dir: Path, global_step: int):
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project, name=run_dir.name, config=asdict(args), sync_tensorboard=True)
        self.writer = SummaryWriter(run_dir, purge_step=global_step)
        self.progress = tqdm(
            desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True,
        )  # fmt: skip

    def log(self, scalars: dict[str, float], returns, global_step: int) -> None:
        """Add one point to every curve and bring the progress line up to date."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, global_step)
        self.progress.set_postfix_str(f"return {np.mean(returns):.1f}" if returns else "", refresh=False)

    def close(self) -> None:
        self.progress.close()
        self.writer.close()


@torch.no_grad()
def evaluate(agent: Agent, envs, episodes: int, generator: torch.Generator, stop=None, frames=None) -> list[float]:
    """True returns of `episodes` whole games with actions sampled from the policy, as in training.

    Each environment plays a share of the games fixed beforehand: first come, first counted would favour short games.
    Cut short by `stop`, the list is shorter. `frames`, a list, gets the first environment's pictures.
    """
    share = np.array([episodes // envs.num_envs + (n < episodes % envs.num_envs) for n in range(envs.num_envs)])
    running, returns = np.zeros(envs.num_envs), []
    obs, _ = envs.reset()
    while share.any() and not (stop and stop.number):
        if frames is not None:
            frames.append(envs.render())
        logits = agent.policy(torch.from_numpy(obs).to(generator.device))
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        actions = (logits - noise).argmax(-1).to("cpu", torch.int32).numpy()
        obs, *results = envs.step(actions)
        rewards, overs = true_game(*results)
        running += rewards
        for n in np.flatnonzero(overs):
            if share[n]:
                returns.append(float(running[n]))
                share[n] -= 1
            running[n] = 0
    return returns


def final_score(args: Args, agent: Agent, device: torch.device, run_dir: Path, stop=None) -> dict:
    """Evaluate, film if asked to, and return the part of the summary that tells of it."""
    scores, generator = [], torch.Generator(device).manual_seed(args.seed)
    seed = (args.seed * 10_000 + 5_000) % 2**30  # away from the training environments
    if args.eval_episodes:
        envs = make_envs(args, min(args.eval_episodes, 32), seed)
        scores = evaluate(agent, envs, args.eval_episodes, generator, stop)
    if args.video and not (stop and stop.number):
        frames = []
        evaluate(agent, make_envs(args, 1, seed + 1_000, render=True), 1, generator, stop, frames)
        first, *others = [Image.fromarray(frame) for frame in frames]
        picture = io.BytesIO()
        first.save(picture, "GIF", save_all=True, append_images=others, duration=1000 // 15, loop=0)
        write_file(run_dir / "episode.gif", picture.getvalue())
    return {
        "eval_return_mean": float(np.mean(scores)) if scores else None,
        "eval_return_std": float(np.std(scores)) if scores else None,
        "eval_episodes": len(scores),
        "eval_returns": scores,
    }


def main(args: Args, stop=None) -> dict:
    """Train, evaluate and summarise one agent; returns the content of summary.json. `stop.number` ends it early."""
    started = time.perf_counter()
    device, mode = check_args(args)
    agent_name = Path(__file__).stem
    saved_dir = args.resume or args.evaluate
    default_dir = f"runs/{args.env_id}__{agent_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(saved_dir or args.run_dir or default_dir)
    if not saved_dir and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        fail(f"--run-dir {run_dir}: is not an empty folder; to go on with a run, name it with --resume")

    # ---- seed and build ----
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads or (cpu_cores() if device.type == "cpu" else 1))
    bf16 = use_precision(args.precision, device)
    checkpoint = load_checkpoint(run_dir, device) if saved_dir else {"global_step": 0, "wall_seconds": 0, "returns": []}
    global_step, returns = checkpoint["global_step"], deque(checkpoint["returns"], maxlen=100)
    # environment i is seeded with this + i: far from other seeds, and new after a resume
    env_seed = (args.seed * 10_000 + global_step) % 2**30
    envs = make_envs(args, 1 if args.evaluate else args.num_envs, env_seed)
    agent = Agent(int(envs.single_action_space.n), bf16).to(device, memory_format=torch.channels_last)
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=True, capturable=device.type == "cuda")
    if saved_dir:
        restore(checkpoint, agent, optimizer, generator)
        lr = optimizer.param_groups[0]["lr"]
    summary = {
        "agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode,
        "torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step, "run_dir": str(run_dir),
    }  # fmt: skip
    if args.evaluate:
        return summary | final_score(args, agent, device, run_dir, stop)

    def save():
        save_checkpoint(run_dir, {
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(), "device": device.type,
            "global_step": global_step, "returns": list(returns), "wall_seconds": wall_seconds(),
        })  # fmt: skip

    def wall_seconds():
        return checkpoint["wall_seconds"] + time.perf_counter() - started

    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", {"agent": agent_name, "args": asdict(args)})
    shutil.copy(__file__, run_dir)
    save()
    logger = Logger(args, run_dir, global_step)

    # ---- speed: the modes bind the same functions; without this block everything below runs eagerly ----
    rollout, metrics = Rollout(args, envs, device), torch.zeros(len(METRICS), device=device)
    functions = policy_step, gae, evaluate_actions, ppo_loss
    if "compile" in mode:
        functions = [torch.compile(f, fullgraph=True, dynamic=False) for f in functions]
    act = partial(act_step, agent, rollout, functions[0])
    learn = partial(update, agent, optimizer, rollout, args, metrics, *functions[1:])
    clock = time.perf_counter()
    if mode != "eager":
        accelerate = capture if "cudagraphs" in mode else warm_up
        act = accelerate(act, lambda: [rollout.t])
        learn = accelerate(learn, lambda: trained_tensors(agent, optimizer))
    compile_seconds = time.perf_counter() - clock

    # ---- the loop ----
    arrays = {name: x.numpy() for name, x in vars(rollout).items() if name.startswith("host_")}
    host_obs, host_actions, host_rewards, host_terminations, host_dones = (
        arrays[f"host_{name}"] for name in ("obs", "actions", "rewards", "terminations", "dones")
    )
    true_rewards, game_overs = np.zeros_like(host_rewards), np.zeros_like(host_rewards, dtype=bool)
    arrived = torch.cuda.Event() if device.type == "cuda" else None
    episodes, finished = Episodes(args.num_envs), []
    host_obs[:], _ = envs.reset()
    dones = np.zeros(args.num_envs, dtype=bool)
    first, last = global_step // args.batch_size + 1, args.num_iterations
    log_every, saved_at = max(1, last // 1000), time.perf_counter()
    for iteration in range(first, last + 1):
        if iteration <= first + 1:  # SPS is measured from the second iteration on: the first warms up what is left
            rollout_seconds, update_seconds, loop_start, loop_step = 0.0, 0.0, time.perf_counter(), global_step
        if args.anneal_lr:
            lr.fill_(args.learning_rate * (1 - (iteration - 1) / last))
        draw_noise(rollout, generator)

        clock = time.perf_counter()
        for t in range(args.num_steps):
            host_dones[t] = dones
            act()
            if arrived:
                arrived.record()
                arrived.synchronize()  # sync: host_actions has been written; the one wait of the loop
            obs, rewards, terminations, truncations, infos = envs.step(host_actions)
            host_obs[:], host_rewards[t], host_terminations[t] = obs, rewards, terminations
            dones = terminations | truncations
            true_rewards[t], game_overs[t] = true_game(rewards, terminations, truncations, infos)
        host_dones[-1] = dones
        rollout_seconds += time.perf_counter() - clock

        clock = time.perf_counter()
        learn()
        if arrived:
            torch.cuda.synchronize(device)  # for the clock: nothing waits here that could go on without the update
        update_seconds += time.perf_counter() - clock

        global_step += args.batch_size
        finished += episodes.add(true_rewards, host_dones[:-1], game_overs)
        logger.progress.update(args.batch_size)
        stopping = iteration == last or bool(stop and stop.number)
        saving = stopping or time.perf_counter() - saved_at > 60 * args.checkpoint_minutes
        if saving or iteration % log_every == 0:
            losses = dict(zip(METRICS, metrics.tolist()))
            if not all(map(math.isfinite, losses.values())):
                logger.close()
                fail(f"the loss is no longer finite at step {global_step} ({losses}); lower --learning-rate? "
                     f"The last checkpoint in {run_dir} is from before", status=1)  # fmt: skip
            sps = (global_step - loop_step) / (time.perf_counter() - loop_start)
            scalars = {f"losses/{name}": value for name, value in losses.items()}
            scalars |= {"charts/SPS": sps, "charts/learning_rate": lr.item()}
            if finished:
                returns.extend(episode_return for episode_return, _ in finished)
                mean_return, mean_length = np.mean(finished, axis=0)
                scalars |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
                finished = []
            logger.log(scalars, returns, global_step)
        if saving:
            save()
            saved_at = time.perf_counter()
        if stopping:
            break
    logger.close()

    # ---- score and summary ----
    steps = global_step - loop_step
    summary |= {
        "global_step": global_step, "compile_seconds": compile_seconds, "sps": sps,
        "sps_rollout": steps / rollout_seconds, "sps_update": steps / update_seconds,
        "train_return_mean": float(np.mean(returns)) if returns else None,
    }  # fmt: skip
    summary |= final_score(args, agent, device, run_dir, stop)
    summary["wall_seconds"] = wall_seconds()
    summary["stopped_by"] = signal.Signals(stop.number).name if stop and stop.number else None
    write_json(run_dir / "summary.json", summary)
    return summary


if __name__ == "__main__":
    stop_signal = StopSignal()
    try:
        result = main(parse_args(), stop_signal)
    except (OSError, torch.OutOfMemoryError) as error:
        fail(f"{type(error).__name__}: {str(error).splitlines()[0]}", status=1)
    print(json.dumps(result))
    sys.exit(128 + stop_signal.number if stop_signal.number else 0)
