# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[atari]==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""PPO with random network distillation (RND) on Atari, from pixels. Burda et al. 2018, arXiv 1810.12894

    python agents/ppo_rnd_atari.py --env-id MontezumaRevenge-v5 --seed 1

For games whose rewards random actions never find. A network is trained to predict the features that another one, random
and fixed, has for the newest picture: its error, large where a picture is new, is a reward of its own, the intrinsic
one. `diff agents/ppo_atari.py agents/ppo_rnd_atari.py` is what that adds.
- The extrinsic return, of the game's rewards, ends with a game; the intrinsic one goes on through the next.
- So a reset row, whose action did nothing, teaches neither the policy nor the extrinsic value. But the picture that it
  leads to is rewarded as any other, and its intrinsic value is trained: what leads to an end bootstraps from there.

The defaults are those of CleanRL's ppo_rnd_envpool, but for whole games instead of lives, as in the paper, and fewer
steps: the paper trains for 490M. It takes a GPU, and no run of the command is on record yet. Differs from the paper in
- the network of ppo_atari, smaller than the paper's, and its clipped extrinsic value, values at half the weight, cut
  gradient, annealed learning rate and normalised advantages;
- pixels enter their statistics after they are learnt from, so that errors are judged and learnt with the same ones;
- an episode cut off by a time limit bootstraps from its last observation instead of counting as an end;
- exactly a quarter of each minibatch trains the predictor, instead of each row with a probability of a quarter;
- games may last 108,000 frames, as in the other agents, instead of 18,000.
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
    total_timesteps: int = 100_000_000  # environment steps to train for, counted over all environments
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:N
    mode: Literal["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"] = "auto"  # how the functions are run
    eval_episodes: int = 10  # whole games played after training for the final score; 0 leaves the evaluation out
    eval_greedy: bool = False  # score and film without sampling, noise or epsilon: by the likeliest or mean action
    run_dir: str | None = None  # folder for all that the run leaves behind; None makes one below runs/
    checkpoint_minutes: float = 5.0  # minutes between two checkpoints; one is written before training, one after it
    resume: str | None = None  # go on with the run in this folder, under its settings unless other flags say otherwise
    evaluate: str | None = None  # only evaluate the checkpoint in this run folder, without training
    video: bool = False  # also play one episode after the evaluation; episode.gif has its first 1,000 steps
    track: bool = False  # mirror the curves to Weights & Biases (needs the package wandb)

    # ---- Environment ----
    env_id: str = "MontezumaRevenge-v5"  # name of the environment in envpool
    num_envs: int = 128  # environments stepped together
    frame_skip: int = 4  # frames that one action is held for
    sticky_actions: float = 0.25  # probability that the last action is repeated (Machado et al. 2018 recommend 0.25)
    full_action_space: bool = False  # use all 18 joystick actions instead of those that the game responds to
    episodic_life: bool = False  # train with every lost life as the end of an episode
    clip_reward: bool = True  # train on the sign of the reward

    # ---- Algorithm ----
    num_steps: int = 128  # steps of every environment in one rollout
    learning_rate: float = 1e-4  # Adam's learning rate at the start
    anneal_lr: bool = True  # lower the learning rate linearly to zero over the run
    gamma: float = 0.999  # discount factor
    int_gamma: float = 0.99  # discount factor of the intrinsic rewards
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches that one epoch splits the rollout into
    update_epochs: int = 4  # passes over the rollout in one learning phase
    norm_adv: bool = True  # normalise the advantages within each minibatch
    clip_coef: float = 0.1  # how far the probability ratio may move before its gradient is cut
    clip_vloss: bool = True  # clip the change of the value estimate as well
    ext_coef: float = 2.0  # weight of the extrinsic advantages
    int_coef: float = 1.0  # weight of the intrinsic advantages
    ent_coef: float = 0.001  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    update_proportion: float = 0.25  # part of each minibatch that the predictor is trained on
    num_iterations_obs_norm_init: int = 50  # rollouts of random actions that begin the statistics of the pictures

    # ---- Speed ----
    torch_threads: int = 0  # CPU threads of torch; 0 leaves the number to torch
    env_threads: int = 0  # CPU threads of envpool; 0 leaves the number to envpool
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto is bf16 where it is fast; tf32 on a CPU is fp32

    def __post_init__(self):
        """Refuse what cannot be meant: tyro prints the sentence of a ValueError and exits with status 2."""
        self.batch_size = self.num_envs * self.num_steps
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some that are counted cannot start
        may_be_0 = {"seed", "eval_episodes", "torch_threads", "env_threads"}
        most = {"gamma": 1, "gae_lambda": 1, "sticky_actions": 1, "torch_threads": 1024, "env_threads": 1024}
        most |= {"int_gamma": 1, "update_proportion": 1}
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
    """The convolutional network of Mnih et al. 2015 (Nature 518) under a policy head and two value heads; and RND.

    Its two networks make features [batch, 512] of normalised pictures [batch, 1, 84, 84]: `target` is random and never
    trained, and `predictor`, with two layers more, as in the paper, learns to give the same. LeakyReLU in
    their convolutions is the authors' code.
    """

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.dtype = torch.bfloat16 if bf16 else torch.float32

        def convolutions(channels: int, activation: nn.Module) -> nn.Module:
            return nn.Sequential(
                layer_init(nn.Conv2d(channels, 32, 8, stride=4)), activation,
                layer_init(nn.Conv2d(32, 64, 4, stride=2)), activation,
                layer_init(nn.Conv2d(64, 64, 3, stride=1)), activation, nn.Flatten(),
                layer_init(nn.Linear(7 * 7 * 64, 512)),
            )  # fmt: skip

        self.network = nn.Sequential(convolutions(4, nn.ReLU()), nn.ReLU())
        self.actor, self.critic = layer_init(nn.Linear(512, num_actions), 0.01), layer_init(nn.Linear(512, 2), 1)
        self.target = convolutions(1, nn.LeakyReLU(0.2)).requires_grad_(False)
        self.predictor = nn.Sequential(
            convolutions(1, nn.LeakyReLU(0.2)), nn.ReLU(),
            layer_init(nn.Linear(512, 512)), nn.ReLU(),
            layer_init(nn.Linear(512, 512)),
        )  # fmt: skip
        self.obs_moments, self.return_moments = Moments(84 * 84), Moments()  # of pixels, of intrinsic returns

    def observe(self, pictures) -> None:
        """Take pictures [batch, 1, 84, 84] uint8 into the statistics of the pixels."""
        pixels = pictures.flatten(1).float()
        self.obs_moments.update(pixels, pixels.new_ones(len(pixels)))

    def normalize(self, pictures):
        """Pictures [batch, 1, 84, 84] uint8 by the running statistics of each pixel, float32, clipped to +-5.

        A pixel that never changes has no variance but rounding errors, which are not to be blown up.
        """
        pixels = pictures.flatten(1).float()
        pixels = (pixels - self.obs_moments.mean) * (self.obs_moments.var + 1e-4).rsqrt()
        return pixels.clamp(-5, 5).view(pictures.shape)

    def forward(self, obs):
        """Logits [batch, num_actions], extrinsic and intrinsic values [batch, 2] for obs [batch, 4, 84, 84] uint8."""
        pixels = obs.to(memory_format=torch.channels_last).to(self.dtype).div_(255)  # fast: in place, 4 x on a CPU
        with torch.autocast(obs.device.type, torch.bfloat16, self.dtype is torch.bfloat16, cache_enabled=False):
            hidden = self.network(pixels).float()  # heads and losses are always float32
        return self.actor(hidden), self.critic(hidden)


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
        self.host = host(N, *shape, dtype=torch.uint8), host(N, dtype=torch.int32), host(3, T + 1, N)
        self.host_obs, self.host_actions, self.host_outcomes = self.host
        self.outcomes = self.host_outcomes.to(device)  # on a CPU the same tensor, and copying to it does nothing
        self.obs = torch.zeros(T + 1, N, *shape, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(T, N, dtype=torch.int64, device=device)
        self.logprobs, self.values = torch.zeros(T, N, device=device), torch.zeros(T + 1, N, 2, device=device)
        self.discounted = torch.zeros(N, device=device)  # discounted sums of the intrinsic rewards so far
        self.gumbel = torch.zeros(T, N, int(envs.single_action_space.n), device=device)
        self.permutations = torch.zeros(args.update_epochs, T * N, dtype=torch.int64, device=device)


def draw_noise(rollout: Rollout, generator: torch.Generator) -> None:
    """Draw all the randomness of one iteration, outside all that is compiled or captured: no graph can freeze it."""
    rollout.gumbel.exponential_(generator=generator).log_().neg_()  # -log of an exponential variate is Gumbel
    for permutation in rollout.permutations:
        torch.randperm(len(permutation), generator=generator, out=permutation)


def sample_actions(agent: Agent, obs, gumbel):
    """Actions [num_envs] int64, their log-probabilities, and values; argmax(logits + Gumbel noise) is a draw."""
    logits, values = agent(obs)
    actions = (logits + gumbel).argmax(-1)
    return actions, logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1), values


@torch.no_grad()
def act(sample_fn, agent: Agent, rollout: Rollout, t: int) -> None:
    """Step t of acting: the newest observations into the rollout, and actions for them back to the host."""
    rollout.obs[t].copy_(rollout.host_obs, non_blocking=True)
    actions, logprobs, values = sample_fn(agent, rollout.obs[t], rollout.gumbel[t])
    rollout.actions[t].copy_(actions)
    rollout.logprobs[t].copy_(logprobs)
    rollout.values[t].copy_(values)
    rollout.host_actions.copy_(rollout.actions[t], non_blocking=True)


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


def prediction_errors(agent: Agent, pictures):
    """How badly the features of pictures [batch, 1, 84, 84] uint8 are predicted, mean squared errors [batch].

    The intrinsic reward of a picture is this error, and what the predictor is trained on as well (section 2.2).
    """
    normalized = agent.normalize(pictures)
    with torch.autocast(pictures.device.type, torch.bfloat16, agent.dtype is torch.bfloat16, cache_enabled=False):
        features, predictions = agent.target(normalized).float(), agent.predictor(normalized).float()
    return (predictions - features).square().mean(-1)


def evaluate_actions(agent: Agent, obs, actions):
    """Log-probabilities of actions [batch] int64 at obs, entropies of the policy, [batch] each, and values."""
    logits, values = agent(obs)
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy, values


def ppo_rnd_loss(agent: Agent, args: Args, obs, actions, logprobs, values, advantages, valid, pictures):
    """The loss of PPO (Schulman et al. 2017, equations 7 and 9) and RND's of a minibatch, and numbers to log.

    Every argument is [minibatch_size, ...]; values and advantages are [minibatch_size, 2], extrinsic and intrinsic.
    `valid` is 1 in rows that count and 0 in reset rows, which count for the intrinsic value and the predictor alone.
    """
    weights = valid / valid.sum().clamp(min=1)  # x @ weights is the mean of x over the rows that count
    newlogprob, entropy, newvalue = evaluate_actions(agent, obs, actions)
    logratio, returns = newlogprob - logprobs, advantages + values
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantages = args.ext_coef * advantages[:, 0] + args.int_coef * advantages[:, 1]
    if args.norm_adv:
        advantages = advantages - advantages @ weights
        advantages = advantages / ((advantages.square() @ weights).sqrt() + 1e-8)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped) @ weights

    v_error, int_v_error = (newvalue - returns).square().unbind(-1)
    if args.clip_vloss:  # not the intrinsic one, which has to follow rewards that wane
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (v_clipped - returns)[:, 0].square())
    value_loss, entropy = 0.5 * v_error @ weights, entropy @ weights
    int_value_loss = 0.5 * int_v_error.mean()

    some = max(1, round(args.update_proportion * len(pictures)))  # rows of a minibatch are in random order
    predictor_loss = prediction_errors(agent, pictures[:some]).mean()

    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics |= {"int_value_loss": int_value_loss, "predictor_loss": predictor_loss}
    metrics["approx_kl"] = (ratio - 1 - logratio) @ weights  # http://joschu.net/blog/kl-approx.html
    metrics["clipfrac"] = (clipped != ratio).float() @ weights
    value_losses = args.vf_coef * (value_loss + int_value_loss)
    return policy_loss + value_losses - args.ent_coef * entropy + predictor_loss, metrics


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
    pictures = rollout.obs[1:, :, -1:].flatten(0, 1)  # the newest of what each action led to
    with torch.no_grad():
        rollout.values[-1].copy_(agent(rollout.obs[-1])[1])
        values, int_values = rollout.values.unbind(-1)
        advantages = gae(rewards, values, terminations, dones, args.gamma, args.gae_lambda)

        errors = torch.cat([prediction_errors(agent, some) for some in pictures.chunk(args.num_minibatches)])
        int_rewards = torch.cat([torch.zeros_like(rewards[:1]), errors.view_as(advantages)])  # row 0 is never read
        no_ends = torch.zeros_like(dones)  # what is new stays new however a game ends
        discounted = discounted_returns(int_rewards, no_ends, rollout.discounted, args.int_gamma)
        rollout.discounted.copy_(discounted[-1])
        agent.return_moments.update(discounted.flatten(), torch.ones_like(errors))
        int_rewards = int_rewards * (agent.return_moments.var + 1e-12).rsqrt()  # in deviations of those sums
        int_advantages = gae(int_rewards, int_values, no_ends, no_ends, args.int_gamma, args.gae_lambda)
    valid = 1 - dones[:-1]  # the action of a reset row did nothing
    both = torch.stack([advantages, int_advantages], -1)
    batch = rollout.obs[:-1], rollout.actions, rollout.logprobs, rollout.values[:-1], both, valid
    batch = [*(x.flatten(0, 1) for x in batch), pictures]

    params, logged = [param for param in agent.parameters() if param.requires_grad], []
    for permutation in rollout.permutations:
        for rows in permutation.chunk(args.num_minibatches):
            minibatch = (x.index_select(0, rows) for x in batch)  # fast: 13 times as fast as x[rows] on a CPU
            grads, metrics = gradients(ppo_rnd_loss, params, agent, args, *minibatch)
            metrics["grad_norm"] = step_optimizer(optimizer, params, grads, args.max_grad_norm)
            logged.append(metrics)
    for some in pictures.chunk(args.num_minibatches):
        agent.observe(some)
    means = {name: torch.stack([metrics[name] for metrics in logged]).mean() for name in logged[0]}
    return means | {"int_reward": int_rewards[1:].mean()}


@torch.no_grad()
def evaluate(agent: Agent, envs, generator: torch.Generator, greedy: bool, stop=(), frames=None) -> list[float]:
    """True returns of one whole game in each environment, by sampled or most likely actions; none after a `stop`.

    `frames`, a list, gets the first 1,000 pictures of the first environment, as PIL images.
    """
    from PIL import Image

    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    lost, lives = ~playing, np.zeros(envs.num_envs, dtype=np.int32)
    obs, _ = envs.reset()
    while playing.any() and not stop:
        if frames is not None and len(frames) < 1000:
            frames.append(Image.fromarray(envs.render()[0]))
        logits, _ = agent(torch.as_tensor(obs, device=generator.device))
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


def accelerate(mode: str, agent: Agent, optimizer, rollout: Rollout, args: Args) -> tuple:
    """The steps of acting, one for each row of the rollout, and the learning phase."""
    sample_fn, gradients_fn = sample_actions, gradients
    if "compile" in mode:
        torch._dynamo.config.trace_autograd_ops = True  # fast: loss and gradients in one piece
        sample_fn, gradients_fn = (torch.compile(f, fullgraph=True, dynamic=False) for f in (sample_fn, gradients_fn))
    acts = [partial(act, sample_fn, agent, rollout, t) for t in range(args.num_steps)]
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
    saved = {"global_step": 0, "wall_seconds": 0.0, "returns": [], "learning_rate": 0.0}
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
    lr = torch.tensor(args.learning_rate, device=device)  # a tensor, so that graphs see it change
    optimizer = torch.optim.Adam(agent.parameters(), lr, eps=1e-5, fused=True, capturable=cuda)
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
    dones = lost = np.zeros(args.num_envs, dtype=bool)
    lives = np.zeros(args.num_envs, dtype=np.int32)
    running = np.zeros((2, args.num_envs))  # returns and lengths of the games under way
    finished = []  # those of the games that ended since the last point of the curves
    iterations = (args.total_timesteps - global_step) // args.batch_size
    saved_at, compile_seconds = time.perf_counter(), 0.0
    speeds = {"sps": None, "sps_rollout": None, "sps_update": None}
    writer = SummaryWriter(run_dir, purge_step=global_step + 1, flush_secs=30)
    progress = tqdm(desc=args.env_id, total=args.total_timesteps, initial=global_step, unit=" steps", unit_scale=True,
                    mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    if not agent.obs_moments.count:  # a new run: random actions show what pictures look like, before any is judged
        progress.set_postfix_str("random actions first")
        rng = np.random.default_rng(args.seed)
        for _ in range(args.num_iterations_obs_norm_init * args.num_steps):
            obs, *_ = envs.step(rng.integers(network["num_actions"], size=args.num_envs, dtype=np.int32))
            agent.observe(torch.as_tensor(obs[:, -1:], device=device))
            if stop:
                iterations = 0  # the checkpoint from before them stands: a resumed run begins with them again
                break
        host_obs[:] = envs.reset()[0]
        progress.set_postfix_str("", refresh=False)
        built = time.perf_counter()  # they are no part of what compiling takes
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
            obs, rewards, terminations, truncations, infos = envs.step(host_actions)
            true_rewards, overs = true_game(truncations, infos, lost, lives)
            running += true_rewards, ~dones  # a reset row is no step of a game
            dones = terminations | truncations
            lost, lives = dones & ~overs, infos["lives"]
            host_obs[:] = obs
            host_outcomes[:, t + 1] = rewards, terminations, dones
            if overs.any():
                finished += running[:, overs].T.tolist()
                running[:, overs] = 0
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
