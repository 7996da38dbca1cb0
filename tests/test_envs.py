"""What the agents rely on about their environments, on the pinned envpool, and how the loop treats it."""

import os
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with, tiny_args

ppo, atari = agent_named("ppo"), agent_named("ppo_atari")
TASKS = Path("/proc/self/task")


def threads_of_this_process():
    return {int(task.name) for task in TASKS.iterdir()}


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


def test_the_lean_step_is_envpools_own():
    lean, own = (ppo.make_envs(ppo.Args(), num_envs=4, seed=5) for _ in range(2))
    lean.reset(), own.reset()
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.integers(2, size=4).astype(np.int32)
        for ours, theirs in zip(lean.step(actions)[:4], own.pool.step(actions)[:4]):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("module", agents_with("make_envs"))
def test_environment_i_has_seed_plus_i(module):
    first, _ = module.make_envs(module.Args(), 3, seed=11).reset()
    second, _ = module.make_envs(module.Args(), 2, seed=12).reset()
    np.testing.assert_array_equal(first[1:], second)


@pytest.mark.parametrize("module", agents_with("blocks"))
def test_two_by_two_blocks_convolve_as_eight_by_eight_pixels(module):
    pictures, generator = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8), torch.Generator().manual_seed(0)
    blocks = module.blocks(pictures)
    assert blocks[2, 1, 5, 7, 4 * 3 + 2] == pictures[2, 1, 4 * 5 + 3, 4 * 7 + 2]
    kernel = torch.randn(8, 4, 8, 8, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(pictures.double(), kernel, stride=4)
    kernel = kernel.unflatten(-1, (2, 4)).unflatten(-3, (2, 4))  # [out, picture, block, row in it, block, column in it]
    kernel = kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    channels = blocks.permute(0, 1, 4, 2, 3).flatten(1, 2).double()
    torch.testing.assert_close(torch.nn.functional.conv2d(channels, kernel), expected)


def test_atari_true_games_run_over_lives_and_are_not_clipped():
    """The same actions with and without shaped training: the true rewards and game ends are the same game's."""
    games = {}
    for shaped in (True, False):
        args = atari.Args(env_id="SpaceInvaders-v5", episodic_life=shaped, clip_reward=shaped)
        envs = atari.make_envs(args, num_envs=2, seed=1)
        rewards, ends, overs = 0.0, 0, 0
        for obs, reward, terminations, truncations, infos in play(envs, 1200, lambda rng: rng.integers(6, size=2)):
            assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8
            true_rewards, over = atari.true_game(reward, terminations, truncations, infos)
            assert (abs(reward) <= 1).all() or not shaped
            rewards, overs, ends = rewards + true_rewards.sum(), overs + over.sum(), ends + terminations.sum()
            assert not shaped or (infos["info:lives"][over] == 0).all()
        games[shaped] = rewards, overs, ends
    assert games[True][2] > games[True][1] > 0, "lives end episodes, games end less often"
    assert games[False][2] == games[False][1]
    assert games[True][0] > 5 * games[True][2], "points of several tens, not clipped to one"


class Script:
    """Two environments with known numbers: episodes of 3 steps that end and of 5 that are cut off, 1 a step."""

    num_envs, lengths = 2, np.array([3, 5])
    single_observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, *args, **kwargs):
        self.elapsed, self.ended = np.zeros(2, int), np.zeros(2, bool)

    def observe(self):
        return np.stack([self.elapsed, self.lengths], 1).astype(np.float32)

    def reset(self):
        self.__init__()
        return self.observe(), {}

    def step(self, actions):
        rewards = (~self.ended).astype(np.float32)
        self.elapsed = np.where(self.ended, 0, self.elapsed + 1)
        self.ended = self.elapsed == self.lengths
        return self.observe(), rewards, self.ended & [True, False], self.ended & [False, True], {}


def test_the_loop_counts_whole_episodes_and_stores_the_right_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", Script)
    rollouts, real_update = [], ppo.update

    def update(agent, optimizer, rollout, *rest):
        rollouts.append({name: getattr(rollout, name).clone() for name in ("rewards", "terminations", "dones", "obs")})
        rollouts[-1]["obs"][-1] = rollout.host_obs
        real_update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(ppo, "update", update)
    sizes = {"num_envs": 2, "num_steps": 7, "num_minibatches": 1, "total_timesteps": 2 * 7 * 6, "eval_episodes": 4}
    summary = ppo.main(ppo.Args(**sizes, run_dir=str(tmp_path / "run")))
    assert sorted(summary["eval_returns"]) == [3, 3, 5, 5]
    # 42 steps: an episode every 4 rows (3 + its reset row) in env 0, every 6 (5 + reset row) in env 1
    assert summary["train_return_mean"] == pytest.approx((10 * 3 + 7 * 5) / 17)

    obs, dones = (np.concatenate([r[name][:-1] for r in rollouts]) for name in ("obs", "dones"))
    rewards, terminations = (np.concatenate([r[name] for r in rollouts]) for name in ("rewards", "terminations"))
    rows = np.arange(42)
    for n, cycle in enumerate((4, 6)):
        np.testing.assert_array_equal(obs[:, n, 0], rows % cycle)
        np.testing.assert_array_equal(dones[:, n], rows % cycle == cycle - 1)  # obs of the end: the reset row
        np.testing.assert_array_equal(rewards[:, n], rows % cycle != cycle - 1)
        np.testing.assert_array_equal(terminations[:, n], (rows % cycle == cycle - 2) & (n == 0))
    for before, after in zip(rollouts, rollouts[1:]):
        np.testing.assert_array_equal(before["obs"][-1], after["obs"][0])
        np.testing.assert_array_equal(before["dones"][-1], after["dones"][0])


def test_a_gymnasium_vector_environment_fits(tmp_path, monkeypatch):
    """README's example of an environment of one's own."""

    def make_envs(args, num_envs, seed, render=False):
        envs = gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync")
        envs.reset(seed=seed)
        return envs

    monkeypatch.setattr(ppo, "make_envs", make_envs)
    summary = ppo.main(ppo.Args(num_envs=4, num_steps=16, total_timesteps=640, run_dir=str(tmp_path / "run")))
    assert summary["global_step"] == 640 and len(summary["eval_returns"]) == 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores of a thread can be chosen on Linux only")
@pytest.mark.parametrize("module", agents_with("one_core"))
def test_rollouts_with_one_worker_keep_to_one_core_and_nothing_else_does(module, tmp_path, monkeypatch):
    """Seen from inside the loop: where this thread and the workers may run, in rollouts and in learning."""
    cores, workers, seen, update = os.sched_getaffinity(0), set(), [], module.update
    if len(cores) == 1:
        pytest.skip("there is one core only")
    one_core = module.one_core

    class Watched(module.EnvPool):
        def step(self, actions):
            seen.append(("rollout", [os.sched_getaffinity(thread) for thread in (0, *workers)]))
            return super().step(actions)

    def watch(*inputs):
        seen.append(("learning", [os.sched_getaffinity(0)]))
        return update(*inputs)

    def note(threads):
        workers.update(threads)
        return one_core(threads)

    monkeypatch.setattr(module, "one_core", note)
    monkeypatch.setattr(module, "EnvPool", Watched)
    monkeypatch.setattr(module, "update", watch)
    for env_threads in (1, 2):
        seen.clear(), workers.clear()
        folder = tmp_path / str(env_threads)
        module.main(tiny_args(module, folder, env_threads=env_threads, num_envs=2, eval_episodes=0))
        assert bool(workers) == (env_threads == 1) and threading.get_native_id() not in workers
        where = {name: [sets for what, sets in seen if what == name] for name in ("rollout", "learning")}
        for sets in where["rollout"]:
            assert all(len(mask) == 1 and mask == sets[0] for mask in sets) if workers else sets == [cores]
        assert where["rollout"] and where["learning"] and all(sets == [cores] for sets in where["learning"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores of a thread can be chosen on Linux only")
@pytest.mark.parametrize("refuse", [False, True])
def test_an_error_in_a_rollout_gives_the_cores_back(refuse, monkeypatch):
    cores = os.sched_getaffinity(0)

    def refused(*_):
        raise PermissionError("a sandbox")

    if refuse:
        monkeypatch.setattr(os, "sched_setaffinity", refused)
    with pytest.raises(ZeroDivisionError), ppo.one_core({threading.get_native_id()}):
        assert len(os.sched_getaffinity(0)) == (len(cores) if refuse else 1)
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == cores


@pytest.mark.skipif(not TASKS.exists(), reason="the threads of a process are listed on Linux only")
@pytest.mark.parametrize("module", agents_with("end_threads"))
def test_torch_has_no_threads_while_environments_step(module, tmp_path, monkeypatch):
    """Seen from inside the loop: before every step the thread that may have helped to find its actions is gone."""
    if not hasattr(module.OPENMP, "omp_pause_resource_all"):
        pytest.skip("an OpenMP before 5.0")
    happened, end_threads = [], module.end_threads

    class Watched(module.EnvPool):
        def step(self, actions):
            happened.append("step")
            return super().step(actions)

    def watch():
        before, deadline = threads_of_this_process(), time.monotonic() + 10
        end_threads()
        while not before - threads_of_this_process():  # how soon an end comes is up to the system
            assert time.monotonic() < deadline, "no thread has ended"
            time.sleep(0.001)
        happened.append("end")

    monkeypatch.setattr(module, "end_threads", watch)
    monkeypatch.setattr(module, "EnvPool", Watched)
    threads = torch.get_num_threads()
    try:
        module.main(tiny_args(module, tmp_path / "run", torch_threads=2, eval_episodes=0, mode="eager"))
    finally:
        torch.set_num_threads(threads)
    assert happened and happened == ["end", "step"] * (len(happened) // 2)


@pytest.mark.skipif(not TASKS.exists(), reason="the threads of a process are listed on Linux only")
@pytest.mark.parametrize("module", agents_with("end_threads"))
@pytest.mark.parametrize("torch_threads", [1, 2])
def test_workers_have_a_core_each_where_torch_has_all_cores_too(module, torch_threads):
    cores = os.sched_getaffinity(0)
    if len(cores) == 1 or len(cores) < os.cpu_count():
        pytest.skip("takes a machine of several cores, all of them ours")
    before, threads = threads_of_this_process(), torch.get_num_threads()
    try:
        torch.set_num_threads(torch_threads)
        envs = module.make_envs(module.Args(), len(cores), seed=0)
    finally:
        torch.set_num_threads(threads)
    envs.reset()
    masks = [os.sched_getaffinity(thread) for thread in threads_of_this_process() - before]
    held = [mask for mask in masks if len(mask) == 1]
    assert sorted(map(tuple, held)) == ([(core,) for core in sorted(cores)] if torch_threads == 2 else [])
