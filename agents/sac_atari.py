# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Soft actor-critic (SAC) on Atari, from pixels. Christodoulou 2019, arXiv 1910.07207

    python agents/sac_atari.py --env-id Pong-v5 --seed 1

Differs from the paper in
- several environments share the replay buffer: their steps alternate with learning phases, in which the updates that
  these steps owe are made up for, as many as for one environment;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- the reset row that the environments put between two episodes is masked out of every loss;
- as in CleanRL, the target of the entropy is 0.89 of the largest one instead of 0.98, Adam's epsilon 1e-4, and a run
  5 million steps instead of 100,000;
- every update moves the target critics a little, not every 8,000th step all the way; the policy follows them, and not
  the critics, whose values for an action jitter by more than a small alpha;
- the policy's loss is divided by the temperature: a small one would make its gradients vanish beside Adam's epsilon;
- policy and critics share an encoder, which the critics alone train (Yarats et al. 2019, arXiv 1910.01741);
- the last layers' first weights are a hundredth of He's: at first no action counts for much more than the others;
- returns, logged and evaluated, are those of whole games, unclipped, however rewards and lives train the agent.
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
from copy import deepcopy
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
    total_timesteps: int = 5_000_000  # environment steps to train for, counted over all environments
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:N
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"  # how the functions are run
    eval_episodes: int = 10  # whole games played after training for the final score; 0 leaves the evaluation out
    eval_greedy: bool = False  # score and film without sampling, noise or epsilon: by the likeliest or mean action
    run_dir: str | None = None  # folder for all that the run leaves behind; None makes one below runs/
    checkpoint_minutes: float = 5.0  # minutes between two checkpoints; one is written before training, one after it
    checkpoint_buffer: Literal["auto", "always", "never"] = "auto"  # save the replay buffer, too; auto: up to 1 GiB
    resume: str | None = None  # go on with the run in this folder, under its settings unless other flags say otherwise
    evaluate: str | None = None  # only evaluate the checkpoint in this run folder, without training
    video: bool = False  # also play one episode after the evaluation; episode.gif has its first 1,000 steps
    track: bool = False  # mirror the curves to Weights & Biases (needs the package wandb)

    # ---- Environment ----
    env_id: str = "Pong-v5"  # name of the environment in envpool
    num_envs: int = 8  # environments stepped together
    frame_skip: int = 4  # frames that one action is held for
    sticky_actions: float = 0.0  # probability that the last action is repeated (Machado et al. 2018 recommend 0.25)
    full_action_space: bool = False  # use all 18 joystick actions instead of those that the game responds to
    episodic_life: bool = True  # train with every lost life as the end of an episode
    clip_reward: bool = True  # train on the sign of the reward

    # ---- Algorithm ----
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    learning_starts: int = 20_000  # environment steps before the first update
    train_frequency: int = 4  # environment steps, over all environments, for each update
    batch_size: int = 64  # transitions of one update
    policy_lr: float = 3e-4  # Adam's learning rate of the policy
    q_lr: float = 3e-4  # Adam's learning rate of the critics and of the temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # how far an update of a target network moves it towards the network: 1 makes it a copy
    autotune: bool = True  # learn the alpha that keeps the policy's entropy at its target
    target_entropy_scale: float = 0.89  # target of the entropy, as a part of that of uniformly random actions
    alpha: float = 0.2  # the temperature, the weight of the entropy, under --no-autotune

    # ---- Speed ----
    torch_threads: int = 0  # CPU threads of torch; 0 leaves the number to torch
    env_threads: int = 0  # CPU threads of envpool; 0 leaves the number to envpool
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto is bf16 where it is fast; tf32 on a CPU is fp32

    def __post_init__(self):
        """Refuse what cannot be meant: tyro prints the sentence of a ValueError and exits with status 2."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some that are counted cannot start
        may_be_0 = {"seed", "eval_episodes", "learning_starts", "torch_threads", "env_threads"}
        most = {"buffer_size": 2**40, "train_frequency": 10_000, "torch_threads": 1024, "env_threads": 1024}
        most |= dict.fromkeys(("sticky_actions", "gamma", "tau", "target_entropy_scale"), 1)
        for name, value in vars(self).items():
            low, high = int(type(value) is int and name not in may_be_0), most.get(name, 2**53)
            if type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
        if self.alpha == 0:
            raise ValueError(f"--alpha {self.alpha}: must be above 0; the policy's loss is divided by it")
        # steps of every environment in one iteration: the fewest that owe a whole number of updates
        self.num_steps = self.train_frequency // math.gcd(self.num_envs, self.train_frequency)
        self.iteration_steps = self.num_envs * self.num_steps
        self.num_updates = self.iteration_steps // self.train_frequency
        for name in ("total_timesteps", "buffer_size"):
            if getattr(self, name) < self.iteration_steps:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: less than one iteration, "
                                 f"{self.num_steps} steps of {self.num_envs} environments")  # fmt: skip
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


def make_envs(args: Args, num_envs: int, seed: int, **extra):
    """A gymnasium vector environment: the last four grey pictures [num_envs, 4, 84, 84] uint8; env i has seed + i.

    It resets by itself, in the step after the end of an episode ("next-step autoreset"): that step ignores its action
    and returns the first observation of the next episode. The observation of the ending step is the episode's last.
    After a lost life and in a new game, envpool itself plays up to 30 frames without action and presses FIRE.
    """
    import envpool

    if args.env_id not in (ids := envpool.list_all_envs()):
        near = ", ".join(difflib.get_close_matches(args.env_id, ids, n=3, cutoff=0.4)) or "none"
        raise UserError(f"--env-id {args.env_id}: envpool has no such environment; nearest: {near}")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no warnings of envpool's float64 bounds
    with explained(f"--env-id {args.env_id}: not an Atari game such as Pong-v5"):
        return envpool.make(
            args.env_id, "gymnasium", num_envs=num_envs, num_threads=min(args.env_threads, num_envs), seed=seed,
            frame_skip=args.frame_skip, max_episode_steps=108_000 // args.frame_skip,  # half an hour of the game
            repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space,
            episodic_life=args.episodic_life, reward_clip=args.clip_reward, **extra,
        )  # fmt: skip


def check_envs(args: Args, envs) -> None:
    """Refuse environments that this agent cannot play."""
    obs, actions, reset = envs.single_observation_space, envs.single_action_space, envs.metadata.get("autoreset_mode")
    pictures = isinstance(obs, gymnasium.spaces.Box) and obs.shape == (4, 84, 84) and obs.dtype == np.uint8
    discrete = isinstance(actions, gymnasium.spaces.Discrete) and actions.start == 0
    if not pictures or not discrete or reset != gymnasium.vector.AutoresetMode.NEXT_STEP:
        raise UserError(f"--env-id {args.env_id}: this agent needs stacks of four pictures, discrete actions from 0 on "
                        f"and next-step autoreset, as in Pong-v5; there are {obs}, {actions}, {reset}")  # fmt: skip


def true_game(truncations, infos, lost, lives):
    """The game's own rewards [num_envs] and whether a game is over [num_envs], however lives and clipping train.

    `lost` is True where the step before lost a life but not the game, and `lives` is what was left. In a reset row with
    more lives the game had ended unseen, among the frames that envpool plays by itself after a lost life.
    """
    unseen = lost & (infos["lives"] > lives)
    return infos["reward"], (infos["terminated"] != 0) | truncations | unseen


def kaiming_init(layer):
    """Gaussian weights that keep the scale of what ReLUs let through (He et al. 2015), biases zero."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """The network of Mnih et al. 2015 (Nature 518) up to its last hidden layer."""

    def __init__(self, bf16: bool):
        super().__init__()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.network = nn.Sequential(
            kaiming_init(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(),
            kaiming_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            kaiming_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(),
            kaiming_init(nn.Linear(7 * 7 * 64, 512)), nn.ReLU(),
        )  # fmt: skip

    def forward(self, obs):
        """Features [batch, 512] for obs [batch, 4, 84, 84] uint8."""
        pixels = obs.to(memory_format=torch.channels_last).to(self.dtype).div_(255)  # fast: in place, 4 x on a CPU
        with torch.autocast(obs.device.type, torch.bfloat16, self.dtype is torch.bfloat16, cache_enabled=False):
            return self.network(pixels).float()  # what follows is always float32


def head(num_actions: int):
    """Two layers that make a number for each action, [batch, num_actions], out of an encoder's features."""
    last = kaiming_init(nn.Linear(512, num_actions))
    last.weight.data.mul_(0.01)  # first gaps between Q-values, if larger than alpha, would leave the policy one action
    return nn.Sequential(kaiming_init(nn.Linear(512, 512)), nn.ReLU(), last)


class TwinCritics(nn.Module):
    """Two Q-functions that share their encoder."""

    def __init__(self, num_actions: int, bf16: bool):
        super().__init__()
        self.encoder, self.first, self.second = Encoder(bf16), head(num_actions), head(num_actions)

    def forward(self, obs):
        """Q-values [2, batch, num_actions] for obs [batch, 4, 84, 84] uint8."""
        features = self.encoder(obs)
        return torch.stack([self.first(features), self.second(features)])


class Agent(nn.Module):
    """The policy, the critics, the target critics that follow them, and the temperature's logarithm.

    The policy sees what the critics' encoder makes of a picture, and does not train the encoder.
    """

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.actor, self.critics = head(num_actions), TwinCritics(num_actions, bf16)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self, obs):
        """Logits [batch, num_actions] of the policy for obs [batch, 4, 84, 84] uint8."""
        with torch.no_grad():
            features = self.critics.encoder(obs)
        return self.actor(features)


# ---- algorithm -------------------------------------------------------------------------------------------------------


class Rollout:
    """The data of one iteration, allocated once and only ever written in place: CUDA graphs know its addresses.

    `outcomes` are rewards, terminations and dones: what the last actions led to, as obs are; and ages, how many frames
    the game has had before. numpy and envpool touch `host_*`, which is pinned memory where the device is a GPU. The
    noise has a row for each step or sampled transition.
    """

    def __init__(self, args: Args, envs, device: torch.device):
        def host(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

        T, N, shape = args.num_steps, args.num_envs, envs.single_observation_space.shape
        self.host = host(N, *shape, dtype=torch.uint8), host(N, dtype=torch.int32), host(4, N)
        self.host_obs, self.host_actions, self.host_outcomes = self.host
        self.obs, self.outcomes = self.host_obs.to(device), self.host_outcomes.to(device)  # on a CPU the same tensors
        self.actions = torch.zeros(N, dtype=torch.int64, device=device)
        self.exploring = torch.zeros((), dtype=torch.bool, device=device)  # until learning starts
        self.gumbel = torch.zeros(T, N, int(envs.single_action_space.n), device=device)
        self.random = torch.zeros(args.num_updates * args.batch_size, dtype=torch.int64, device=device)


class FrameReplay(nn.Module):
    """The latest steps of all environments, on the device and allocated once: rings of rows [num_rows, num_envs, ...].

    Row t has the newest frame of obs[t] and actions[t], taken there; what they led to is in row t + 1: its rewards,
    terminations and frame. Every frame is kept once; ages[t], how many frames of its game came before, tells which ones
    make up obs[t]. dones[t] is 1 where obs[t] is the last of its episode: the action there did nothing, and is no valid
    transition.
    """

    def __init__(self, args: Args, rollout: Rollout, device: torch.device):
        super().__init__()
        self.num_envs, self.depth = rollout.obs.shape[:2]
        self.num_rows = math.ceil(args.buffer_size / args.num_envs) + self.depth  # the oldest are for later stacks
        columns = {"frames": rollout.obs[:, -1], "actions": rollout.actions}  # [num_envs, ...], like the outcomes
        columns |= zip(("rewards", "terminations", "dones", "ages"), rollout.outcomes)
        for name, x in columns.items():
            self.register_buffer(name, torch.zeros(self.num_rows, *x.shape, dtype=x.dtype, device=device))
        self.register_buffer("row", torch.tensor(-1, device=device))  # where the newest frame is
        self.register_buffer("complete", torch.tensor(-1, device=device))  # rows to sample from: their next is there

    def store(self, obs, outcomes) -> None:
        """Begin a row: the newest obs [num_envs, depth, 84, 84] and the outcomes [4, num_envs] that came with them."""
        self.row.add_(1).remainder_(self.num_rows)
        self.complete.add_(1).clamp_(max=self.num_rows - self.depth)  # the stacks of older rows have lost frames
        rings = self.frames, self.rewards, self.terminations, self.dones, self.ages
        for ring, x in zip(rings, (obs[:, -1], *outcomes)):
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

        def take(ring, row, env):
            places = row * self.num_envs + env
            return ring.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)

        def stacks(row):  # the first frame of a game stands for those before it, as in envpool
            back = torch.arange(self.depth - 1, -1, -1, device=row.device)
            back = back.minimum(take(self.ages, row, env).long()[:, None])
            return take(self.frames, (row[:, None] - back) % self.num_rows, env[:, None])

        after = (row + 1) % self.num_rows
        result = [stacks(row), take(self.actions, row, env), take(self.rewards, after, env)]
        return result + [take(self.terminations, after, env), stacks(after), 1 - take(self.dones, row, env)]


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration, outside all that is compiled or captured: no graph can freeze it."""
    rollout.gumbel.exponential_(generator=generator).log_().neg_()  # -log of an exponential variate is Gumbel
    rollout.random.random_(generator=generator)


@torch.no_grad()
def act(policy, replay: FrameReplay, rollout: Rollout, t: int) -> None:
    """Step t of acting: what the last step led to into the replay buffer, and new actions back to the host."""
    rollout.obs.copy_(rollout.host_obs, non_blocking=True)
    rollout.outcomes.copy_(rollout.host_outcomes, non_blocking=True)
    replay.store(rollout.obs, rollout.outcomes)
    logits = policy(rollout.obs).masked_fill(rollout.exploring, 0)  # exploring: all actions alike
    rollout.actions.copy_((logits + rollout.gumbel[t]).argmax(-1))  # a draw from the policy
    replay.remember(rollout.actions)
    rollout.host_actions.copy_(rollout.actions, non_blocking=True)


def discrete_sac_critic_loss(agent: Agent, args: Args, obs, actions, rewards, terminations, next_obs, valid):
    """The mean squared errors of both critics, added up, over a minibatch, and numbers to log (Christodoulou 2019,
    equations 4 and 10, without the half, as in CleanRL).

    Every argument is [batch_size, ...]; `valid` is 1 in transitions that count and 0 in others.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over the transitions that count
    with torch.no_grad():
        logprobs = agent(next_obs).log_softmax(-1)
        soft_q_values = agent.target_critics(next_obs).amin(0) - agent.log_alpha.exp() * logprobs
        targets = rewards + args.gamma * (1 - terminations) * (logprobs.exp() * soft_q_values).sum(-1)
    q_values = agent.critics(obs).gather(-1, actions.expand(2, -1)[..., None]).squeeze(-1)  # [2, batch_size]
    loss = ((q_values - targets).square() @ weights).sum()
    return loss, {"q_loss": loss, "q_values": (q_values @ weights).mean()}


def discrete_sac_policy_loss(agent: Agent, args: Args, obs, valid):
    """The losses of the policy and of the temperature (equations 12 and 11), added up: each trains its own parameters.

    Every argument is [batch_size, ...]; `valid` is 1 in transitions that count and 0 in others. The policy's loss is
    the paper's over alpha: the KL divergence from softmax(Q / alpha), but for a constant. The minimum is the same, and
    the gradients do not shrink with alpha, below Adam's epsilon.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over what counts
    logprobs, alpha = agent(obs).log_softmax(-1), agent.log_alpha.exp()
    probs, target_entropy = logprobs.exp(), args.target_entropy_scale * math.log(logprobs.shape[-1])
    with torch.no_grad():
        q_values = agent.target_critics(obs).amin(0)
    loss = (probs * (logprobs - q_values / alpha.detach())).sum(-1) @ weights
    entropies = -(probs * logprobs).detach().sum(-1)
    alpha_loss = alpha * ((entropies - target_entropy) @ weights)
    return loss + alpha_loss, {"policy_loss": loss, "entropy": entropies @ weights, "alpha": alpha}


def gradients(loss_fn, params: list, *inputs) -> tuple[list, dict]:
    """Gradients of the loss that loss_fn(*inputs) returns, one for each of `params`, and its numbers to log."""
    loss, metrics = loss_fn(*inputs)
    grads = torch.autograd.grad(loss, params)
    # a fused optimizer takes for granted that a gradient lies in memory as its parameter does
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in zip(grads, params)]
    return grads, {name: value.detach() for name, value in metrics.items()}


def update(agent: Agent, optimizers, replay: FrameReplay, rollout: Rollout, args: Args, gradients=gradients) -> dict:
    """The learning phase: the updates that one iteration owes; returns the means of the metrics."""
    q_params, policy_params = list(agent.critics.parameters()), list(agent.actor.parameters())
    targets = list(agent.target_critics.parameters())
    if args.autotune:
        policy_params.append(agent.log_alpha)
    q_optimizer, policy_optimizer = optimizers
    transitions, logged = replay.sample(rollout.random), []  # fast: those of all updates at once
    for minibatch in zip(*(x.split(args.batch_size) for x in transitions)):
        grads, metrics = gradients(discrete_sac_critic_loss, q_params, agent, args, *minibatch)
        for param, grad in zip(q_params, grads):
            param.grad = grad
        q_optimizer.step()

        obs, *_, valid = minibatch
        grads, policy_metrics = gradients(discrete_sac_policy_loss, policy_params, agent, args, obs, valid)
        for param, grad in zip(policy_params, grads):
            param.grad = grad
        policy_optimizer.step()

        with torch.no_grad():
            torch._foreach_lerp_(targets, q_params, args.tau)  # fast: one kernel for all, not one for each
        logged.append(metrics | policy_metrics)
    return {name: torch.stack([metrics[name] for metrics in logged]).mean() for name in logged[0]}


@torch.no_grad()
def evaluate(agent: Agent, envs, generator: torch.Generator, greedy: bool, stop=(), frames=None) -> list[float]:
    """True returns of one whole game in each environment, by sampled or greedy actions; none after a `stop`.

    `frames`, a list, gets the first 1,000 pictures of the first environment, as PIL images.
    """
    from PIL import Image

    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    lost, lives = ~playing, np.zeros(envs.num_envs, dtype=np.int32)
    obs, _ = envs.reset()
    while playing.any() and not stop:
        if frames is not None and len(frames) < 1000:
            frames.append(Image.fromarray(envs.render()[0]))
        logits = agent(torch.as_tensor(obs, device=generator.device))
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        actions = (logits if greedy else logits + gumbel).argmax(-1).int().cpu().numpy()
        obs, _, terminations, truncations, infos = envs.step(actions)
        rewards, overs = true_game(truncations, infos, lost, lives)
        lost, lives = (terminations | truncations) & ~overs, infos["lives"]
        returns += rewards * playing
        playing &= ~overs
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


def accelerate(mode: str, agent: Agent, optimizers, replay: FrameReplay, rollout: Rollout, args: Args) -> tuple:
    """The steps of acting, one for each row of the noise, and the learning phase."""
    policy_fn, gradients_fn = agent, gradients
    if "compile" in mode:
        torch._dynamo.config.trace_autograd_ops = True  # fast: loss and gradients in one piece
        gradients_fn = torch.compile(gradients, fullgraph=True, dynamic=False)
        if rollout.obs.is_cuda:  # on a CPU, calling a compiled policy costs more than it saves
            policy_fn = torch.compile(agent, fullgraph=True, dynamic=False)
    acts = [partial(act, policy_fn, replay, rollout, t) for t in range(args.num_steps)]
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
    fast_bf16 = torch.cuda.get_device_capability() >= (8, 0) if cuda else torch.cpu._is_avx512_bf16_supported()
    bf16 = args.precision == "bf16" or (args.precision == "auto" and fast_bf16)
    torch.backends.fp32_precision = "tf32" if cuda and args.precision != "fp32" else "ieee"
    torch.backends.cudnn.benchmark = True
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
    saved = {"global_step": 0, "wall_seconds": 0.0, "returns": []}
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is missing or damaged"):
            saved |= torch.load(Path(source, "checkpoint.pt"), map_location="cpu", weights_only=True)
    global_step, returns = saved["global_step"], deque(saved["returns"], maxlen=100)
    started -= saved["wall_seconds"]
    envs = make_envs(args, 1 if args.evaluate else args.num_envs, env_seed(args, "training", global_step))
    check_envs(args, envs)
    network = {"num_actions": int(envs.single_action_space.n)}
    agent = Agent(**network, bf16=bf16).to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(args.seed)
    groups = [{"params": list(agent.actor.parameters()), "lr": args.policy_lr}]
    groups += [{"params": [agent.log_alpha], "lr": args.q_lr}] if args.autotune else []
    optimizers = [torch.optim.Adam(agent.critics.parameters(), args.q_lr, eps=1e-4, fused=True, capturable=cuda),
                  torch.optim.Adam(groups, eps=1e-4, fused=True, capturable=cuda)]  # fmt: skip
    if source:
        with explained(f"--resume or --evaluate: {source}/checkpoint.pt is not of this agent in this environment"):
            agent.load_state_dict(saved["agent"])
            for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
            if saved["device"] == device.type:
                generator.set_state(saved["generator"])
    if not args.autotune:
        agent.log_alpha.data.fill_(args.alpha).log_()
    summary = {"agent": agent_name, "env_id": args.env_id, "seed": args.seed, "device": str(device), "mode": mode}
    summary |= {"torch": torch.__version__, "num_envs": args.num_envs, "global_step": global_step}
    if args.evaluate:
        return summary | final_score(args, agent, device, Path(source), stop) | {"run_dir": source}
    rollout = Rollout(args, envs, device)
    refill = 0  # iterations that fill a buffer anew that no checkpoint has
    buffer_bytes = sum(x.nbytes for x in FrameReplay(args, rollout, torch.device("meta")).buffers())
    copies = 2 if args.checkpoint_buffer == "always" and not cuda and "replay" not in saved else 1
    check_memory(args, copies * buffer_bytes, device)  # a checkpoint is another copy in the memory of the host
    replay = FrameReplay(args, rollout, device)
    keeps = {"always": math.inf, "auto": 2**30, "never": 0}  # bytes up to which a checkpoint has it
    if "replay" in saved:
        with explained(f"{source}/checkpoint.pt: its replay buffer is not of this --buffer-size and --num-envs"):
            replay.load_state_dict(saved.pop("replay"))
        replay.dones[replay.row] = 1  # no transition leads from games that were left to those that begin now
    elif args.resume and global_step + args.iteration_steps <= args.total_timesteps:
        refill = math.ceil(min(global_step, max(args.learning_starts, 1), args.buffer_size) / args.iteration_steps)

    def save():
        state = {"agent": agent.state_dict(), "optimizer": [x.state_dict() for x in optimizers]}
        state |= {"generator": generator.get_state(), "device": device.type, "returns": list(returns)}
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
    steps = f"{refill * args.iteration_steps} steps, which do not count"
    notes = [f"the replay buffer was not saved: {steps}, fill it anew"] if refill else []
    for note in notes:
        tqdm.write(note, file=sys.stderr)

    # ---- the loop ----
    acts, learn = accelerate(mode, agent, optimizers, replay, rollout, args)
    host_obs, host_actions, host_outcomes = (x.numpy() for x in rollout.host)
    host_obs[:] = envs.reset()[0]
    dones = overs = lost = np.zeros(args.num_envs, dtype=bool)
    ages = lives = np.zeros(args.num_envs, dtype=np.int32)
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
            obs, rewards, terminations, truncations, infos = envs.step(host_actions)
            # a game begins after the end of one, or where that was unseen; all but infos are of the step before
            begins = dones & (overs | (infos["lives"] > lives))
            ages = np.where(begins, 0, ages + 1)
            true_rewards, overs = true_game(truncations, infos, lost, lives)
            running += true_rewards, ~dones  # a reset row is no step of a game
            dones = terminations | truncations
            lost, lives = dones & ~overs, infos["lives"]
            host_obs[:] = obs
            host_outcomes[:] = rewards, terminations, dones, ages
            if overs.any():
                finished += running[:, overs].T.tolist()
                running[:, overs] = 0
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
            scalars["charts/SPS"] = speeds["sps"]
            if finished:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(finished, axis=0)
                returns.extend(episode_return for episode_return, _ in finished)
                finished.clear()
                progress.set_postfix_str(f"return {np.mean(returns):.1f}", refresh=False)
            if not all(map(math.isfinite, scalars.values())):
                raise FloatingPointError(f"not finite any more at step {global_step}: {scalars}; a lower "
                                         "--q-lr may help, and checkpoint.pt is from before")  # fmt: skip
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
