"""What the agents rely on about their environments, on the pinned envpool, and how the loop treats it."""

import functools
import inspect
import json
import math
import warnings
from types import SimpleNamespace

import envpool
import gymnasium
import numpy as np
import pytest
import torch
from conftest import (
    NAMES,
    agent_named,
    agents_with,
    continuous,
    final_json,
    first_fast,
    read_checkpoint,
    slow_unless_new,
    tiny_args,
)

ppo, atari = agent_named("ppo"), agent_named("ppo_atari")


def play(envs, steps, policy, seed=0):
    """Step with actions from `policy(rng)`; yields what each step returned."""
    rng = np.random.default_rng(seed)
    envs.reset()
    for _ in range(steps):
        yield envs.step(np.asarray(policy(rng), dtype=np.int32))


def test_the_step_after_an_end_is_a_reset_row():
    envs = ppo.make_envs(ppo.Args(), num_envs=8, seed=3)
    dones, ends = np.zeros(8, bool), 0
    for obs, rewards, terminations, truncations, _ in play(envs, 300, lambda rng: rng.integers(2, size=8)):
        assert (rewards[dones] == 0).all() and (rewards[~dones] == 1).all()
        assert (abs(obs[dones]) <= 0.05).all(), "CartPole starts within 0.05 of zero"
        assert not (terminations | truncations)[dones].any()
        fallen = (abs(obs[:, 0]) > 2.4) | (abs(obs[:, 2]) > 12 * np.pi / 180)
        assert (fallen == terminations).all(), "the observation of the ending step is the episode's own last"
        dones = terminations | truncations
        ends += dones.sum()
    assert ends > 20


def test_time_limits_truncate():
    envs = ppo.make_envs(ppo.Args(env_id="MountainCar-v0"), num_envs=2, seed=3)
    steps = list(play(envs, 200, lambda rng: np.ones(2)))
    assert steps[-1][3].all() and not steps[-1][2].any(), "cut off after 200 steps, and that is no termination"
    assert not any((terminations | truncations).any() for _, _, terminations, truncations, _ in steps[:-1])


def test_an_end_in_the_last_allowed_step_counts_as_a_cut():
    """Today's behaviour of envpool, which README and make_envs tell: it should be a termination."""
    envs = envpool.make("CartPole-v1", "gymnasium", num_envs=32, seed=1, max_episode_steps=8)
    *steps, (obs, _, terminations, truncations, _) = play(envs, 8, lambda rng: np.ones(32))
    assert not any((cut).any() for _, _, _, cut, _ in steps)
    fallen = (abs(obs[:, 0]) > 2.4) | (abs(obs[:, 2]) > 12 * np.pi / 180)
    assert 0 < fallen.sum() < 32 and truncations.all() and not terminations.any()


@pytest.mark.parametrize("module", agents_with("make_envs"))
def test_environment_i_has_seed_plus_i(module):
    first, _ = module.make_envs(module.Args(), 3, seed=11).reset()
    second, _ = module.make_envs(module.Args(), 2, seed=12).reset()
    np.testing.assert_array_equal(first[1:], second)


def test_atari_true_games_run_over_lives_and_are_not_clipped():
    """The same actions with and without shaped training: the true rewards and game ends are the same game's."""
    games = {}
    for shaped in (True, False):
        args = atari.Args(env_id="SpaceInvaders-v5", episodic_life=shaped, clip_reward=shaped)
        envs = atari.make_envs(args, num_envs=2, seed=1)
        rewards, ends, overs = 0.0, 0, 0
        lost, lives = np.zeros(2, bool), np.zeros(2)
        for obs, reward, terminations, truncations, infos in play(envs, 1200, lambda rng: rng.integers(6, size=2)):
            assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
            true_rewards, over = atari.true_game(truncations, infos, lost, lives)
            lost, lives = (terminations | truncations) & ~over, infos["lives"]
            assert (abs(reward) <= 1).all() or not shaped
            rewards, overs, ends = rewards + true_rewards.sum(), overs + over.sum(), ends + terminations.sum()
            assert not shaped or (infos["lives"][over] == 0).all()
        games[shaped] = rewards, overs, ends
    assert games[True][2] > games[True][1] > 0, "lives end episodes, games end less often"
    assert games[False][2] == games[False][1]
    assert games[True][0] > 5 * games[True][2], "points of several tens, not clipped to one"


class Script:
    """Two environments with known numbers: episodes of 3 steps that end and of 5 that are cut off, 1 a step.

    A reset row has a reward of 9, as some environments have one there: it is no step of a game.
    """

    num_envs, lengths = 2, np.array([3, 5])
    single_observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    single_action_space = gymnasium.spaces.Discrete(2)
    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}

    def __init__(self, *args, **kwargs):
        self.elapsed, self.ended = np.zeros(2, int), np.zeros(2, bool)

    def observe(self):
        return np.stack([self.elapsed, self.lengths], 1).astype(np.float32)

    def reset(self):
        self.__init__()
        return self.observe(), {}

    def step(self, actions):
        rewards = np.where(self.ended, 9, 1).astype(np.float32)
        self.elapsed = np.where(self.ended, 0, self.elapsed + 1)
        self.ended = self.elapsed == self.lengths
        return self.observe(), rewards, self.ended & [True, False], self.ended & [False, True], {}


def test_the_loop_counts_whole_episodes_and_stores_the_right_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", Script)
    rollouts, real_update = [], ppo.update

    def update(agent, optimizer, rollout, *rest):
        metrics = real_update(agent, optimizer, rollout, *rest)
        names = "rewards", "terminations", "dones"
        rollouts.append(dict(zip(names, rollout.outcomes.clone())) | {"obs": rollout.obs.clone()})
        return metrics

    monkeypatch.setattr(ppo, "update", update)
    sizes = {"num_envs": 2, "num_steps": 7, "num_minibatches": 1, "total_timesteps": 2 * 7 * 6, "eval_episodes": 2}
    summary = ppo.main(ppo.Args(**sizes, run_dir=str(tmp_path / "run")))
    assert sorted(summary["eval_returns"]) == [3, 5]
    # 42 steps: an episode every 4 rows (3 + its reset row) in env 0, every 6 (5 + reset row) in env 1
    assert summary["train_return_mean"] == pytest.approx((10 * 3 + 7 * 5) / 17)

    obs, dones = (np.concatenate([r[name][:-1] for r in rollouts]) for name in ("obs", "dones"))
    rewards, terminations = (np.concatenate([r[name][1:] for r in rollouts]) for name in ("rewards", "terminations"))
    rows = np.arange(42)
    for n, cycle in enumerate((4, 6)):
        np.testing.assert_array_equal(obs[:, n, 0], rows % cycle)
        np.testing.assert_array_equal(dones[:, n], rows % cycle == cycle - 1)  # obs of the end: the reset row
        np.testing.assert_array_equal(rewards[:, n], rows % cycle != cycle - 1)
        np.testing.assert_array_equal(terminations[:, n], (rows % cycle == cycle - 2) & (n == 0))
    for before, after in zip(rollouts, rollouts[1:]):
        np.testing.assert_array_equal(before["obs"][-1], after["obs"][0])
        for name in ("rewards", "terminations", "dones"):
            np.testing.assert_array_equal(before[name][-1], after[name][0])


# ---- environments of other kinds -------------------------------------------------------------------------------------

Box, Discrete, Modes = gymnasium.spaces.Box, gymnasium.spaces.Discrete, gymnasium.vector.AutoresetMode
vector_agents = [x for x in NAMES if "atari" not in x and not continuous(x)]


class Count(gymnasium.Env):
    """Guess the parity of a number that counts up: observations of any type."""

    action_space = Discrete(2)

    def __init__(self, dtype):
        self.observation_space = Box(0, 9, (3,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = int(self.np_random.integers(2))
        return np.full(3, self.count, self.observation_space.dtype), {}

    def step(self, action):
        reward = float(action == self.count % 2)
        self.count += 1
        return np.full(3, self.count, self.observation_space.dtype), reward, self.count == 9, False, {}


def gymnasium_envs(make):
    """README's example of an environment of one's own: a make_envs of gymnasium's vector environments."""

    def make_envs(args, num_envs, seed, **extra):
        envs = gymnasium.vector.SyncVectorEnv([make] * num_envs)
        envs.reset(seed=seed)
        return envs

    return make_envs


@pytest.mark.parametrize("dtype", ["int32", "float64", "uint8"])
@pytest.mark.parametrize("agent", vector_agents)
def test_a_gymnasium_vector_environment_fits(agent, dtype, tmp_path, monkeypatch):
    module = agent_named(agent)
    monkeypatch.setattr(module, "make_envs", gymnasium_envs(lambda: Count(dtype)))
    summary = module.main(tiny_args(module, tmp_path, eval_episodes=3))
    assert summary["global_step"] > 0 and len(summary["eval_returns"]) == 3
    assert summary["train_return_mean"] > 2 and all(0 <= x <= 9 for x in summary["eval_returns"])


@pytest.mark.parametrize("agent", vector_agents)
def test_blackjack_has_observations_of_int32(agent, tmp_path):
    module = agent_named(agent)
    summary = module.main(tiny_args(module, tmp_path, env_id="Blackjack-v1", eval_episodes=10))
    assert set(summary["eval_returns"]) <= {-1, 0, 1, 1.5} and len(summary["eval_returns"]) == 10


def spaces_for(agent):
    """Observation and action space that an agent plays."""
    pictures = Box(0, 255, (1 if "lstm" in agent else 4, 84, 84), np.uint8)
    obs = pictures if "atari" in agent else Box(-np.inf, np.inf, (5,), np.float64)
    return obs, Box(-2, 1, (3,), np.float32) if continuous(agent) else Discrete(3)


def refused(agent, obs, actions, mode=Modes.NEXT_STEP, env_id="Mine-v0"):
    """The sentence by which check_envs refuses such environments, or None."""
    module = agent_named(agent)
    envs = SimpleNamespace(
        single_observation_space=obs, single_action_space=actions, num_envs=4, metadata={"autoreset_mode": mode}
    )
    try:
        module.check_envs(module.Args(env_id=env_id), envs)
    except module.UserError as error:
        assert env_id in str(error) and "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize("agent", NAMES)
def test_what_an_agent_cannot_play_is_refused(agent):
    obs, actions = spaces_for(agent)
    assert refused(agent, obs, actions) is None
    assert refused(agent, obs, actions, Modes.SAME_STEP) and refused(agent, obs, actions, Modes.DISABLED)
    assert refused(agent, obs, actions, None)
    others = [gymnasium.spaces.MultiDiscrete([2, 3]), gymnasium.spaces.Dict(a=actions)]
    if continuous(agent):
        others += [Box(-np.inf, np.inf, (3,)), Box(0, np.inf, (3,)), Box(-2, 2, (3,), np.int32), Box(-1, 1, (2, 3))]
        others += [Discrete(3)]
    else:
        others += [Discrete(3, start=1), Discrete(3, start=-1), Box(-1, 1, (3,))]
    for other in others:
        assert refused(agent, obs, other), other
    others = [Discrete(9), Box(0, 1, (3, 3)), Box(0, 255, (84, 84, 4), np.uint8), gymnasium.spaces.Dict(a=obs)]
    others += [Box(0, 1, obs.shape)] if "atari" in agent else [Box(0, 1, ())]
    for other in others:
        assert refused(agent, other, actions), other


@functools.cache
def families():
    """Ids of envpool by the family that they belong to."""
    found = {}
    for env_id in envpool.list_all_envs():
        found.setdefault(envpool.registration.registry.specs[env_id][0], []).append(env_id)
    return found


@functools.cache
def spec_of(env_id, **options):
    """What envpool says of an environment, None where the family does not work on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            spec = envpool.make_spec(env_id, **options)
            return spec.observation_space, spec.action_space
        except Exception:
            return None


def check_ids(agent, ids):
    """Every environment is accepted, and then of a shape that fits, or refused in a sentence; returns the first."""
    accepted = set()
    for env_id in ids:
        options = {"stack_num": 1} if "lstm" in agent and env_id in families()["envpool.atari"] else {}
        if spec := spec_of(env_id, **options):
            obs, actions = spec
            if isinstance(obs, gymnasium.spaces.Dict) and continuous(agent):
                obs = Box(-np.inf, np.inf, (sum(math.prod(x.shape) for x in agent_named(agent).leaves(obs)),))
            if refused(agent, obs, actions, env_id=env_id) is None:
                accepted.add(env_id)
                assert obs.dtype == np.uint8 if "atari" in agent else len(obs.shape) == 1
                if continuous(agent):
                    assert np.isfinite(np.float32([actions.low, actions.high])).all(), env_id
                else:
                    assert actions.n > 1
        else:
            module = agent_named(agent)
            with pytest.raises(module.UserError, match=env_id):
                module.make_envs(module.Args(env_id=env_id), 1, 0)
    return accepted


@pytest.mark.parametrize("agent", NAMES)
def test_an_environment_of_each_family(agent):
    assert len(families()) > 15
    ids = [ids[0] for ids in families().values()] + [agent_named(agent).Args().env_id]
    assert len(ids) > len(check_ids(agent, ids)) > 0


@pytest.mark.parametrize("module", first_fast("FlatObservations"))
def test_dictionaries_become_one_vector(module):
    """Entries in the order of the space, nested ones too, without what only a simulator knows."""
    sizes = {"WalkerWalk-v1": 24, "Go1JoystickFlatTerrain-v1": 48, "FrankaKitchen-v1": 59 + 2 * 17}
    for env_id, size in sizes.items():
        envs = module.make_envs(module.Args(env_id=env_id), 3, 7)
        plain = envpool.make_gymnasium(env_id, num_envs=3, seed=7)
        module.check_envs(module.Args(env_id=env_id), envs)
        assert envs.single_observation_space.shape == (size,)
        (flat, _), (tree, _) = envs.reset(), plain.reset()
        for _ in range(3):
            entries = dict(tree)
            while any(isinstance(x, dict) for x in entries.values()):
                pairs = [(k, v) if isinstance(v, dict) else ("", {k: v}) for k, v in entries.items()]
                entries = {f"{k}.{name}": x for k, inner in pairs for name, x in inner.items()}
            wanted = [x.reshape(3, -1) for name, x in entries.items() if "privileged" not in name]
            np.testing.assert_array_equal(flat, np.concatenate(wanted, axis=1))
            actions = np.zeros((3, *envs.single_action_space.shape), envs.single_action_space.dtype)
            (flat, *_), (tree, *_) = envs.step(actions), plain.step(actions)


@pytest.mark.slow
@pytest.mark.parametrize("agent", NAMES)
def test_every_environment(agent):
    ids = envpool.list_all_envs()
    assert len(ids) > 1600
    accepted = check_ids(agent, ids)
    assert len(accepted) >= (100 if "atari" in agent else 1000 if continuous(agent) else 5), accepted


# ---- seeds and films -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", NAMES)
def test_no_two_environments_have_the_same_seed(agent):
    """Environment i has seed + i: training, its resumptions, evaluation and film keep apart, and so do seeds."""
    module, taken, uses = agent_named(agent), set(), 0
    for seed in range(1, 6):
        args = module.Args(seed=seed)
        steps = [("training", 1024 * n) for n in range(5)] + [("evaluation", 0), ("film", 0)]
        for purpose, global_step in steps:
            first = module.env_seed(args, purpose, global_step)
            assert 0 <= first and first + 2**14 < 2**31
            taken |= set(range(first, first + 512))
            uses += 1
            assert len(taken) == 512 * uses, (seed, purpose, global_step)
    assert module.env_seed(module.Args(seed=2**53), "film") < 2**31
    assert module.env_seed(args, "training", 64) == module.env_seed(args, "training", 64)


@pytest.mark.parametrize("agent", slow_unless_new())
def test_training_resumption_and_evaluation_use_these_seeds(agent, runs, cli, tmp_path, monkeypatch):
    seeds, make = [], envpool.make

    def noted(*inputs, seed, **options):
        seeds.append(seed)
        return make(*inputs, seed=seed, **options)

    done = runs(agent)
    steps, run_dir = final_json(done.result)["global_step"], done.copy(tmp_path / "run")
    module, args = agent_named(agent), agent_named(agent).parse_args(done.argv)
    monkeypatch.setattr(envpool, "make", noted)
    film = "atari" not in agent  # whose episodes are long
    final_json(cli(agent, "--resume", run_dir, "--eval-episodes", 1, *["--video"][:film]))
    training, *rest = seeds
    assert training == module.env_seed(args, "training", steps) != module.env_seed(args, "training")
    assert set(rest) == {module.env_seed(args, purpose) for purpose in ("evaluation", "film")[: 1 + film]}
    seeds.clear()
    summary = final_json(cli(agent, "--evaluate", run_dir, "--no-video", "--eval-episodes", 1))
    assert summary["eval_episodes"] == len(summary["eval_returns"]) == 1
    assert seeds[-1] == module.env_seed(args, "evaluation"), "the same games as after training"


class UnseenEnds:
    """Games of two lives, each a reset row and three steps of one point. The end of every other game goes unseen.

    RoadRunner ends so: the game, not only the life, is over among the frames that envpool plays by itself.
    """

    metadata, single_action_space = {"autoreset_mode": Modes.NEXT_STEP}, Discrete(2)

    def __init__(self, num_envs, stack):
        self.num_envs, self.single_observation_space = num_envs, Box(0, 255, (stack, 84, 84), np.uint8)

    def reset(self):
        self.row = -1
        return self.step(None)[0], {}

    def step(self, actions):
        self.row += 1
        game, life, step = self.row // 8, self.row // 4 % 2, self.row % 4
        over = step == 3 and life == 1 and game % 2 == 1
        lives = 0 if over else 3 - life - (step == 3)
        numbers = {"reward": step > 0, "terminated": over, "lives": lives}
        infos = {name: np.full(self.num_envs, int(number)) for name, number in numbers.items()}
        ends, obs = np.full(self.num_envs, step == 3), np.zeros(self.single_observation_space.shape, np.uint8)
        return np.stack([obs] * self.num_envs), infos["reward"].astype(np.float32), ends, ends & False, infos


@pytest.mark.parametrize("module", agents_with("true_game"))
def test_a_game_that_ends_unseen_is_a_game_of_its_own(module, monkeypatch, tmp_path):
    stack = 1 if "lstm" in module.__name__ else 4
    monkeypatch.setattr(module, "make_envs", lambda args, num_envs, seed: UnseenEnds(num_envs, stack))
    summary = module.main(tiny_args(module, tmp_path, eval_episodes=2))
    assert summary["train_return_mean"] == 6 and summary["eval_returns"] == [6, 6]
    replay = read_checkpoint(tmp_path / "run").get("replay", {})
    if "ages" in replay:  # of two environments, which stacks of frames must not reach behind
        assert replay["ages"][:16, 1].tolist() == [*range(8), *range(8)]


class Long:
    """One environment, an episode of 1100 steps, pictures of it, infos as Atari has them."""

    num_envs, pictures = 1, 0

    def __init__(self, agent):
        self.single_observation_space, self.single_action_space = spaces_for(agent)
        self.metadata, self.elapsed = {"autoreset_mode": Modes.NEXT_STEP}, 0

    def reset(self):
        return self.single_observation_space.sample()[None].clip(-1, 1), {}

    def render(self):
        self.pictures += 1
        return np.zeros((1, 4, 4, 3), np.uint8)

    def step(self, actions):
        self.elapsed += 1
        over = np.array([self.elapsed == 1100])
        infos = {"reward": np.ones(1), "terminated": over.astype(int), "lives": np.ones(1)}
        return self.reset()[0], np.ones(1), over, np.zeros(1, bool), infos


@pytest.mark.parametrize("agent", [pytest.param(x, marks=[pytest.mark.slow] * ("atari" in x)) for x in NAMES])
def test_a_film_ends_after_a_thousand_pictures(agent, runs):
    done, module, frames = runs(agent), agent_named(agent), []
    obs, actions = spaces_for(agent)
    network = {"obs_shape": obs.shape, "num_actions": 3, "action_dim": 3}
    network |= {"low": [-1.0] * 3, "high": [1.0] * 3} if continuous(agent) else {}
    saved = json.loads((done.path / "config.json").read_text())["network"]
    envs, inputs = Long(agent), inspect.signature(module.evaluate).parameters
    given = {
        "agent": module.Agent(**{name: network.get(name, value) for name, value in saved.items()}),
        "envs": envs,
        "frames": frames,
    }
    given |= {"args": module.Args(), "generator": torch.Generator().manual_seed(1), "greedy": True}
    scores = module.evaluate(**{name: value for name, value in given.items() if name in inputs})
    assert scores == [1100] and len(frames) == envs.pictures == 1000


def test_a_stopped_evaluation_has_no_score(tmp_path):
    """Its first games to end are the short ones: their mean would be too low."""
    module, stop, ended = agent_named("ppo"), [], []
    envs = module.make_envs(module.Args(), 16, 3)
    step = envs.step

    def watched(actions):
        result = step(actions)
        ended.extend(np.flatnonzero(result[2] | result[3]))
        stop.extend([15] if len(ended) >= 4 else [])
        return result

    envs.step = watched
    agent, generator = module.Agent((4,), 2), torch.Generator().manual_seed(1)
    assert module.evaluate(agent, envs, generator, greedy=False, stop=stop) == [] and len(ended) >= 4
