"""The loop of every agent, in environments with known numbers: what it stores, anneals, counts, saves and puts back."""

import copy
import functools
import inspect
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import AGENTS, agents_with, continuous, read_checkpoint, settings, tiny, tiny_args

each = pytest.mark.parametrize("module", [pytest.param(module, id=module.__name__) for module in AGENTS])
rolling = pytest.mark.parametrize("module", agents_with("gae") + agents_with("q_lambda"))  # they learn from rollouts
buffers = [agents_with(name) for name in ("Replay", "FrameReplay", "PrioritizedReplay")]
replaying = pytest.mark.parametrize("module", sum(buffers, []))


class Script:
    """Two environments: episodes of 3 steps that end, and of 5 that are cut off; 1 a step. Observations tell the step.

    With pictures, an episode is a life of the first environment, which has two in a game, and the game's own rewards
    are 10. Else a reset row has a reward of 9, as some environments have one there: it is no step of a game.
    """

    num_envs, lengths = 2, np.array([3, 5])
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, agent: str):
        self.pictures, stack = "atari" in agent, 1 if "lstm" in agent else 4
        box = gymnasium.spaces.Box
        self.single_observation_space = box(0, 255, (stack, 84, 84), np.uint8) if self.pictures else box(-9, 9, (2,))
        self.single_action_space = box(-1, 1, (2,)) if continuous(agent) else gymnasium.spaces.Discrete(3)
        self.returns, self.cycles = ([60, 50], [8, 6]) if self.pictures else ([3, 5], [4, 6])  # rows from game to game
        self.actions, self.all_actions = [], []

    def observe(self):
        if not self.pictures:
            return np.stack([self.elapsed, self.lengths], 1).astype(np.float32)
        obs = np.full((2, *self.single_observation_space.shape), 255, np.uint8)
        obs[:, -1, 0, 0] = self.elapsed
        return obs

    def reset(self):
        self.elapsed, self.ended, self.lives = np.zeros(2, int), np.zeros(2, bool), np.array([2, 2])
        return self.observe(), {}

    def step(self, actions):
        self.actions.append(np.array(actions))
        self.all_actions.append(self.actions[-1])
        rewards = np.where(self.ended, 0 if self.pictures else 9, 1).astype(np.float32)
        self.lives = np.where(self.ended & (self.lives == 0), 2, self.lives)
        self.elapsed = np.where(self.ended, 0, self.elapsed + 1)
        self.ended = self.elapsed == self.lengths
        self.lives = self.lives - self.ended * [1, 2]
        infos = {"reward": 10 * rewards, "terminated": self.ended & (self.lives == 0), "lives": self.lives}
        return self.observe(), rewards, self.ended & [True, False], self.ended & [False, True], infos


def elapsed(obs):
    """What the observations [..., num_envs, *shape] of Script tell."""
    return np.asarray(obs[..., -1, 0, 0] if obs.ndim > 4 or obs.shape[-1] == 84 else obs[..., 0])


def listed(x) -> list:
    """Of one optimizer or several."""
    return x if isinstance(x, list) else [x]


def play(module, args, patch):
    """Run `main` in Script, with a learning phase that only steps the optimizers, and return what was seen of it."""
    seen = SimpleNamespace(args=args, envs=[], updates=[], generators=[], scored=[], pixels=set(), rows=None)
    evaluate, draw_noise = module.evaluate, module.draw_noise

    def make_envs(args, num_envs, seed, **extra):
        seen.envs.append(Script(module.__name__))
        return seen.envs[-1]

    def noted_draw(rollout, generator):
        """Noise by which row t has actions 0 and 1 in turns, or negative and positive ones."""
        played = seen.envs[0].actions
        if seen.rows is not None:  # of the iteration before
            np.testing.assert_array_equal(np.sign(played), seen.rows.expand(-1, *played[0].shape).numpy())
        played.clear()
        seen.generators.append(generator.get_state())
        draw_noise(rollout, generator)
        seen.rows = None
        if hasattr(rollout, "gumbel"):
            seen.rows = torch.arange(len(rollout.gumbel))[:, None] % 2
            rollout.gumbel.copy_(1e3 * torch.eye(3)[seen.rows].expand_as(rollout.gumbel))
        elif hasattr(rollout, "noise") and not getattr(rollout, "exploring", False):
            seen.rows = 2 * (torch.arange(len(rollout.noise))[:, None, None] % 2) - 1
            rollout.noise.copy_(1e3 * seen.rows.expand_as(rollout.noise))

    def update(agent, optimizers, *inputs):
        optimizers = listed(optimizers)
        rollout = next(x for x in inputs if type(x).__name__ == "Rollout")
        seen.replay = next((x for x in inputs if hasattr(x, "sample")), None)
        seen.played = list(seen.envs[0].all_actions)
        if not seen.updates:
            seen.states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
        rates = [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        host_obs, _, outcomes = (x.clone().numpy() for x in rollout.host[:3])
        now = {"obs": rollout.obs.clone(), "host_obs": host_obs, "outcomes": outcomes, "rates": rates}
        seen.updates.append(SimpleNamespace(**now, epsilon=float(getattr(agent, "epsilon", math.nan))))
        for optimizer in optimizers:
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                param.grad = torch.ones_like(param)
            optimizer.step()
        return {}

    def noted_evaluate(*inputs):
        bound = inspect.signature(evaluate).bind(*inputs).arguments
        seen.scored.append((bound.get("greedy"), float(getattr(bound["agent"], "epsilon", math.nan))))
        return evaluate(*inputs)

    def note(layer, inputs):
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels == seen.envs[0].single_observation_space.shape[0]:
            seen.pixels.add(inputs[0].float().max().item())  # RND's other networks see the newest picture alone

    for name, function in {"draw_noise": noted_draw, "evaluate": noted_evaluate}.items():
        patch.setattr(module, name, function)
    patch.setattr(module, "make_envs", make_envs)
    patch.setattr(module, "update", update)
    patch.setattr(torch.nn.init, "orthogonal_", lambda weight, gain: weight)  # quicker
    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        seen.summary = module.main(args)
    seen.checkpoint = read_checkpoint(Path(args.run_dir or args.resume))
    return seen


@functools.cache
def runs(module) -> list:
    """What was seen of a run of ten iterations, greedy in the end, and of a resumption for four more that is not."""
    sizes = {"num_envs": 2, "num_steps": 7, "num_minibatches": 1, "learning_starts": 8, "train_frequency": 4}
    sizes |= {"utd": 0.25, "anneal_lr": True, "exploration_fraction": 1.0, "eval_greedy": True}
    sizes = {name: value for name, value in sizes.items() if name in settings(module.__name__)}
    with tempfile.TemporaryDirectory() as folder:
        args = tiny_args(module, Path(folder), **sizes)
        iteration = args.batch_size if hasattr(args, "num_minibatches") else args.iteration_steps
        longer = ["--resume", f"{folder}/run", "--total-timesteps", str(14 * iteration)]
        longer += ["--no-eval-greedy"] if "eval_greedy" in sizes else []
        seen = []
        for argv in (tiny(module.__name__, run_dir=f"{folder}/run", total_timesteps=10 * iteration, **sizes), longer):
            with pytest.MonkeyPatch.context() as patch:
                seen.append(play(module, module.parse_args(argv), patch))
            seen[-1].iteration = iteration
        return seen


def schedules(args, step):
    """Learning rate and epsilon at a step; nan where the agent anneals none."""
    lr = args.learning_rate * (1 - step / args.total_timesteps) if hasattr(args, "anneal_lr") else math.nan
    if not hasattr(args, "end_e"):
        return lr, math.nan
    return lr, np.interp(step / args.total_timesteps, (0, args.exploration_fraction), (args.start_e, args.end_e))


@each
def test_learning_rate_and_epsilon_follow_their_lines(module):
    """Over a resumption as well."""
    for seen, start, least in zip(runs(module), (0, 10), (6, 4)):
        iterations = range(start, 10 if start == 0 else 14)[-len(seen.updates) :]
        assert len(iterations) == len(seen.updates) >= least
        for iteration, update in zip(iterations, seen.updates):
            lr, epsilon = schedules(seen.args, iteration * seen.iteration)
            assert math.isnan(lr) or update.rates == pytest.approx([lr] * len(update.rates))
            assert update.epsilon == pytest.approx(epsilon, nan_ok=True)


@each
def test_returns_and_scores_are_of_whole_games(module):
    for seen, greedy in zip(runs(module), (True, False)):
        returns = seen.envs[0].returns
        assert seen.summary["eval_returns"] == returns, "of the first game of each environment, and of it alone"
        assert set(seen.checkpoint["returns"]) == set(returns)
        if greedy and not hasattr(seen.args, "num_iterations_obs_norm_init"):  # RND plays some rows before
            rows = range(len(seen.envs[0].all_actions) + 1)
            ends = [row % cycle == cycle - 1 for cycle in seen.envs[0].cycles for row in rows]
            assert len(seen.checkpoint["returns"]) == sum(ends)
        assert seen.summary["train_return_mean"] == np.mean(seen.checkpoint["returns"])
        assert not hasattr(seen.args, "eval_greedy") or greedy in {flag for flag, _ in seen.scored}
        epsilons = [epsilon for _, epsilon in seen.scored]
        assert epsilons == pytest.approx([getattr(seen.args, "end_e", math.nan)] * len(epsilons), nan_ok=True)


@each
def test_a_resumption_puts_everything_back(module):
    before, after = runs(module)
    saved = before.checkpoint
    assert torch.equal(after.generators[0], saved["generator"]) and len(after.generators) >= 4
    assert after.checkpoint["returns"][: len(saved["returns"])] == saved["returns"]
    for expected, state in zip(listed(saved["optimizer"]), after.states, strict=True):
        assert state and state.keys() == expected["state"].keys()
        for key, numbers in state.items():
            assert all(torch.equal(x, expected["state"][key][name]) for name, x in numbers.items())


@rolling
def test_a_rollout_has_what_the_environments_did(module):
    last = None
    for seen in runs(module)[0].updates:
        steps = np.concatenate([elapsed(seen.obs[:-1]), elapsed(seen.host_obs)[None]])
        rewards, terminations, dones = seen.outcomes
        np.testing.assert_array_equal(dones, steps == Script.lengths)
        np.testing.assert_array_equal(terminations, dones * [1, 0])
        if last is None:  # the very first row is of a reset, or of the last random step before training
            rewards, steps = rewards[1:], steps[1:]
        else:
            np.testing.assert_array_equal(seen.outcomes[:, 0], last)
        np.testing.assert_array_equal(rewards, steps > 0)
        last = seen.outcomes[:, -1]


@replaying
def test_a_replay_buffer_has_what_the_environments_did(module):
    seen = runs(module)[0]
    replay, rows = seen.replay, len(seen.played)  # the row of the newest observation
    assert replay.row == rows > 10
    steps = elapsed(replay.frames[: rows + 1, :, None] if hasattr(replay, "frames") else replay.obs[: rows + 1])
    np.testing.assert_array_equal(steps, np.arange(rows + 1)[:, None] % (Script.lengths + 1))
    dones = steps == Script.lengths
    columns = {"actions": seen.played, "rewards": steps > 0, "dones": dones, "terminations": dones * [1, 0]}
    columns["ages"] = np.arange(rows + 1)[:, None] % [8, 6]
    for name, expected in columns.items():
        if hasattr(replay, name):
            np.testing.assert_allclose(getattr(replay, name)[: len(expected)], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("module", agents_with("true_game"))
def test_a_network_sees_pixels_between_0_and_1(module):
    assert runs(module)[0].pixels == {1.0}
