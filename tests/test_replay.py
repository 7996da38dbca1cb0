"""The replay buffers give back what went in, at every seam, each transition as often as every other; and updates,
memory and resumption of the agents that have one. A plain list of steps is what they are compared with.
"""

import dataclasses
import inspect
import io
import math
import re
from collections import Counter
from types import SimpleNamespace

import envpool
import numpy as np
import pytest
import torch
from conftest import agents_with, continuous, read_checkpoint, tiny_args
from test_envs import Script

REPLAYS = agents_with("Replay") + agents_with("FrameReplay")
each_replay = pytest.mark.parametrize("module", REPLAYS)  # that draws transitions of one step, each alike
LEARNERS = REPLAYS + agents_with("PrioritizedReplay")  # whose own tests are in test_rainbow.py
each_learner = pytest.mark.parametrize("module", LEARNERS)
entropic = pytest.mark.parametrize("module", agents_with("discrete_sac_policy_loss"))
real_agents = pytest.mark.parametrize("module", agents_with("Actor"))
CPU = torch.device("cpu")


class Steps:
    """Steps of all environments in a plain list: what a replay buffer must hold that keeps `num_rows` transitions."""

    def __init__(self, num_rows):
        self.num_rows, self.obs, self.outcomes, self.actions = num_rows, [], [], []

    def store(self, obs, rewards, terminations, dones):
        self.obs.append(np.array(obs, np.uint8 if obs.dtype == np.uint8 else np.float32))
        self.outcomes.append(np.array([rewards, terminations, dones], np.float32))

    def resume(self):
        """The step that was never acted on is lost, and no transition leads from here to where environments begin."""
        del self.obs[len(self.actions) :], self.outcomes[len(self.actions) :]
        self.outcomes[-1][2] = 1

    def held(self) -> Counter:
        """The valid transitions of the latest rows, with how many there are of each."""
        transitions, last = Counter(), len(self.actions) - 1
        for row in range(max(0, last - self.num_rows), last):
            for n in np.flatnonzero(self.outcomes[row][2] == 0):
                rewards, terminations, _ = self.outcomes[row + 1]
                now, after = self.obs[row][n].tobytes(), self.obs[row + 1][n].tobytes()
                transitions[now, self.actions[row][n].tobytes(), rewards[n], terminations[n], after] += 1
        return transitions

    def check(self, replay):
        """Every transition comes back with what belongs to it, and three times out of three times their number."""
        count = min(len(self.actions) - 1, self.num_rows) * len(self.obs[0])
        drawn = [x.numpy() for x in replay.sample(torch.arange(3 * count))]
        rows = [(o.tobytes(), a.tobytes(), r, e, p.tobytes()) for o, a, r, e, p, valid in zip(*drawn) if valid == 1]
        assert Counter(rows) == Counter({key: 3 * number for key, number in self.held().items()})
        assert set(np.unique(drawn[-1])) <= {0, 1}, "valid or not"


def scripted(module, N, rng):
    """Steps of N environments with next-step autoreset, without end; for frames, also with lost lives and ages.

    Every observation is another: its numbers are the environment, the step and the game.
    """
    frames, over, done = "atari" in module.__name__, np.ones(N, bool), np.zeros(N, bool)
    game, ages, stacks, step = np.zeros(N, int), np.zeros(N), [None] * N, 0
    while True:
        reset, started = done.copy(), over.copy()
        done = ~reset & (rng.random(N) < 0.3) if step else np.zeros(N, bool)
        terminations, over = done & (rng.random(N) < 0.5), done & ((rng.random(N) < 0.5) | (not frames))
        rewards, obs = np.where(reset, 0, rng.normal(size=N)), []
        for n in range(N):
            game[n] += started[n]
            picture = np.array([[n, step % 256], [step // 256, game[n] % 256]])
            stacks[n] = [picture] * 4 if started[n] else [*stacks[n][1:], picture]
            obs.append(stacks[n] if frames else picture.flatten())
            ages[n] = 0 if started[n] else ages[n] + 1
        yield np.array(obs, np.uint8 if frames else np.float32), (rewards, terminations, done, ages)[: 3 + frames]
        step += 1


def new_replay(module, N, size):
    """A replay buffer for `size` transitions of N scripted environments."""
    frames, real = hasattr(module, "FrameReplay"), continuous(module.__name__)
    obs = torch.zeros(N, 4, 2, 2, dtype=torch.uint8) if frames else torch.zeros(N, 4)
    actions = torch.zeros(N, 2) if real else torch.zeros(N, dtype=torch.int64)
    rollout = SimpleNamespace(obs=obs, actions=actions, outcomes=torch.zeros(4 if frames else 3, N))
    kind = module.FrameReplay if frames else module.Replay
    return kind(SimpleNamespace(num_envs=N, buffer_size=size), rollout, CPU)


@each_replay
@pytest.mark.parametrize("N, size", [(3, 40), (1, 7), (4, 4)])
def test_every_transition_comes_back_and_no_reset_row(module, N, size):
    """Over laps of the ring, after every step: s, a, r, whether it ended there, and s'; stacks in full."""
    rng = np.random.default_rng(size)
    replay, steps, rows = new_replay(module, N, size), Steps(math.ceil(size / N)), math.ceil(size / N)
    for number, (obs, outcomes) in zip(range(4 * rows + 20), scripted(module, N, rng)):
        actions = torch.tensor(rng.normal(size=(N, 2)) if continuous(module.__name__) else rng.integers(5, size=N))
        actions = actions.to(replay.actions.dtype)
        replay.store(torch.tensor(obs), torch.tensor(np.array(outcomes), dtype=torch.float32))
        replay.remember(actions)
        steps.store(obs, *outcomes[:3])
        steps.actions.append(actions.numpy())
        if number:
            steps.check(replay)
        if number % 13 == 12:  # a checkpoint, and back
            fresh = new_replay(module, N, size)
            fresh.load_state_dict(replay.state_dict())
            replay = fresh
    assert all(x.device == CPU for x in replay.buffers()) and not list(replay.parameters())


@pytest.mark.parametrize("module", agents_with("FrameReplay"))
def test_frames_are_kept_once(module):
    """A million transitions take 84 x 84 bytes and six numbers each, below 7 GiB."""
    args = module.Args()
    obs, outcomes = torch.zeros(args.num_envs, 4, 84, 84, dtype=torch.uint8), torch.zeros(4, args.num_envs)
    rollout = SimpleNamespace(obs=obs, actions=torch.zeros(args.num_envs, dtype=torch.int64), outcomes=outcomes)
    size = sum(x.nbytes for x in module.FrameReplay(args, rollout, torch.device("meta")).buffers())
    assert args.buffer_size == 1e6 and 1e6 * 84 * 84 < size < 1.001e6 * (84 * 84 + 24) < 7 * 2**30


def watched_envs(module, steps, monkeypatch, limit):
    """Have envpool's answers and the agent's actions noted in `steps`, and episodes end after `limit` steps."""
    make, act = envpool.make, module.act

    def watched(*names, **options):
        envs = make(*names, **options | {"max_episode_steps": limit})
        reset, step = envs.reset, envs.step

        def noted_reset():
            result = reset()
            nothing = np.zeros(envs.num_envs)
            steps.store(result[0], nothing, nothing, nothing)
            return result

        def noted_step(actions):
            result = step(actions)
            steps.store(*result[:3], result[2] | result[3])
            return result

        envs.reset, envs.step = noted_reset, noted_step
        return envs

    def noted_act(*inputs):
        act(*inputs)
        steps.actions.append(inputs[-2].actions.clone().numpy())

    monkeypatch.setattr(envpool, "make", watched)
    monkeypatch.setattr(module, "act", noted_act)


@each_replay
def test_training_stores_what_the_environments_did(module, tmp_path, monkeypatch):
    """Over several laps of the ring and a resumption; stacks equal envpool's own, over lost lives and ends of games."""
    name, checks = module.__name__, []
    atari, real = "atari" in name, continuous(name)
    changes = {"env_id": "RoadRunner-v5", "frame_skip": 60} if atari else {}  # some games end soon, and some unseen
    changes |= {"num_envs": 2, "buffer_size": 41, "learning_starts": 4, "total_timesteps": 240, "eval_episodes": 0}
    if hasattr(module.Args, "train_frequency"):
        changes |= {"train_frequency": 2}
    if hasattr(module.Args, "end_e"):
        changes |= {"end_e": 1.0}  # random games are short
    steps = Steps(21)
    watched_envs(module, steps, monkeypatch, limit=90 if real else 15 if atari else 40)

    def check(*inputs):
        checks.append(len(steps.actions))
        if len(checks) % 7 == 0 or 115 < len(steps.actions) < 126:  # around the resumption every time
            steps.check(next(x for x in inputs if hasattr(x, "sample")))
        return {}

    monkeypatch.setattr(module, "update", check)
    module.main(tiny_args(module, tmp_path, **changes))
    steps.resume()
    args = module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "320"])
    assert module.main(args)["global_step"] == 320
    assert checks == [*range(3, 161)] and len(steps.actions) == 160, "a learning phase after every step"
    rewards, terminations, dones = np.array(steps.outcomes).transpose(1, 0, 2)
    least = 1 if real else 2
    assert (dones > terminations).sum() >= least and terminations.sum() >= least and np.unique(rewards).size > 1


@pytest.fixture(autouse=True)
def quick_networks(monkeypatch):
    """Weights that start as they are: to make those of pictures orthogonal takes longer than most of these tests."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, gain: weight)


# ---- noise and updates -----------------------------------------------------------------------------------------------


@each_replay
def test_noise_is_as_told_and_fresh_every_time(module):
    real, before, generator = continuous(module.__name__), None, torch.Generator()
    names = re.findall(r"rollout\.(\w+)\.(?:normal|exponential)_", inspect.getsource(module.draw_noise))
    drawn = {"noise", "update_noise"} & {*names} if real else {"gumbel"}
    rollout = SimpleNamespace(random=torch.zeros(100_000, dtype=torch.int64))
    for name in drawn:
        setattr(rollout, name, torch.zeros(20, 1000, 3))
    for _ in range(2):
        module.draw_noise(rollout, generator)
        for name in drawn:
            x = getattr(rollout, name)
            assert abs(x.mean() - (0 if real else np.euler_gamma)) < 0.03
            assert abs(x.var() - (1 if real else np.pi**2 / 6)) < 0.05
        assert rollout.random.min() >= 0 and rollout.random.max() > 2**60
        remainders = torch.bincount(rollout.random % 7, minlength=7) / 100_000
        torch.testing.assert_close(remainders, torch.full((7,), 1 / 7), rtol=0.05, atol=0)
        values = [rollout.random.clone(), *(getattr(rollout, name).clone() for name in drawn)]
        assert before is None or not any(torch.equal(a, b) for a, b in zip(before, values))
        before = values


@real_agents
def test_actions_are_uniform_while_exploring_and_then_the_policys(module):
    obs, noise, args = torch.zeros(100_000, 4), torch.randn(100_000, 2), SimpleNamespace(exploration_noise=0.25)
    deterministic, mean = not hasattr(module, "sac_critic_loss"), torch.tensor([0.5, -0.9])
    agent = SimpleNamespace(low=torch.tensor([-1.0, -3]).double(), high=torch.tensor([1.0, 1]).double())
    agent.actor = lambda obs, noise: ((mean + noise).tanh(), None)
    if deterministic:
        agent.actor = lambda obs: mean.expand(len(obs), 2)
    given = (agent, args, obs, noise) if deterministic else (agent, obs, noise)
    actions = module.sample_actions(*given, torch.tensor(True))
    histogram = torch.histc(actions, 10, -1, 1) / actions.numel()
    torch.testing.assert_close(histogram, torch.full((10,), 0.1), rtol=0.05, atol=0)
    expected = (mean + 0.25 * noise).clamp(-1, 1) if deterministic else (mean + noise).tanh()
    torch.testing.assert_close(module.sample_actions(*given, torch.tensor(False)), expected)

    scaled, (first, second) = module.Agent.scale(agent, actions), actions.double().T
    torch.testing.assert_close(scaled, torch.stack([first, 2 * second - 1], 1), rtol=0, atol=1e-6)
    broken = module.Agent.scale(agent, torch.tensor([[float("nan"), 2.0]]))
    assert broken.tolist() == [[-1, 1]], "an environment gets numbers within its bounds, whatever happens"


@entropic
def test_discrete_actions_are_uniform_while_exploring_and_then_the_policys(module):
    """Played and stored are the same actions, also where a policy is as sure as can be."""
    draws, logits, stored = 100_000, torch.tensor([0.0, 1.0, 100.0, -1.0]), {}
    rollout = SimpleNamespace(
        host_obs=torch.rand(draws, 1), obs=torch.zeros(draws, 1), host_outcomes=torch.rand(4, draws),
        outcomes=torch.zeros(4, draws), actions=torch.zeros(draws, dtype=torch.int64), random=torch.zeros(1),
        host_actions=torch.zeros(draws, dtype=torch.int32), gumbel=torch.zeros(2, draws, 4),
    )  # fmt: skip
    replay = SimpleNamespace(
        store=lambda obs, outcomes: stored.update(obs=obs.clone(), outcomes=outcomes.clone()),
        remember=lambda actions: stored.update(actions=actions.clone()),
    )
    module.draw_noise(rollout, torch.Generator().manual_seed(1))
    for exploring, sure in ((True, 100.0), (False, 2.0)):
        rollout.exploring, logits[2] = torch.tensor(exploring), sure
        module.act(lambda obs: logits.expand(len(obs), 4), replay, rollout, 1)
        frequencies = torch.bincount(rollout.actions, minlength=4) / draws
        expected = torch.full((4,), 0.25) if exploring else logits.softmax(-1)
        torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.005)
        assert torch.equal(stored["obs"], rollout.host_obs) and torch.equal(stored["outcomes"], rollout.host_outcomes)
        assert torch.equal(stored["actions"], rollout.host_actions.long())


@entropic
@pytest.mark.parametrize("start", [0, 30, 48])
def test_exploration_ends_where_learning_starts(module, start, tmp_path, monkeypatch):
    """And not after a resumption, whose first steps fill the buffer anew."""
    seen, learnt, act = [], [], module.act
    monkeypatch.setattr(module, "act", lambda *inputs: (seen.append(inputs[-2].exploring.item()), act(*inputs)))
    monkeypatch.setattr(module, "update", lambda *_: learnt.append(len(seen)) or {})
    changes = {"num_envs": 2, "train_frequency": 2, "learning_starts": start, "total_timesteps": 64}
    module.main(tiny_args(module, tmp_path, eval_episodes=0, checkpoint_buffer="never", **changes))
    assert seen == [2 * step < start for step in range(32)]
    assert learnt[0] == max(start // 2, 1) + 1, "learning starts with the step after the last random one"
    seen.clear()
    module.main(module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "80"]))
    assert seen == [False] * (8 + max(math.ceil(start / 2), 1))


@entropic
def test_evaluation_draws_from_the_policy_or_takes_its_best_action(module):
    logits, N = torch.tensor([0.0, 2.0, 1.0, -1.0]), 50_000
    for greedy in (False, True):
        played = []

        def step(actions, played=played):
            played.append(torch.tensor(actions))
            over = np.full(N, len(played) == 4)
            infos = {"reward": np.ones(N), "terminated": over, "lives": ~over}
            return np.zeros((N, 1)), np.ones(N), over, over & False, infos

        envs = SimpleNamespace(num_envs=N, reset=lambda: (np.zeros((N, 1)), {}), step=step)
        agent, generator = (lambda obs: logits.expand(len(obs), 4)), torch.Generator().manual_seed(1)
        assert module.evaluate(agent, envs, generator, greedy) == [4.0] * N
        frequencies = torch.bincount(torch.cat(played).long(), minlength=4) / (4 * N)
        expected = torch.tensor([0.0, 1, 0, 0]) if greedy else logits.softmax(-1)
        torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.005)


def no_gradients(calls):
    """Stands for gradients(): notes the loss in `calls`, and returns gradients of 0, which move nothing."""

    def gradients(loss_fn, params, *inputs):
        calls.append((loss_fn.__name__, [x for x in inputs if isinstance(x, torch.Tensor)]))
        metrics = {loss_fn.__name__: torch.zeros(()), "priorities": torch.zeros(3)}  # rainbow's update takes those out
        return [torch.zeros_like(param) for param in params], metrics

    return gradients


OWING = [(*case.values, *sizes) for case in LEARNERS for sizes in [(1, 4), (4, 1), (6, 4)]]
OWING = [case for case in OWING if case[1] == 6 or "atari" not in case[0].__name__]  # pictures take their time


@pytest.mark.parametrize("module, num_envs, every", OWING, ids=lambda x: getattr(x, "__name__", x))
def test_every_step_is_followed_by_the_updates_it_owes(module, num_envs, every, tmp_path, monkeypatch):
    """One update of batch_size transitions for every `every` environment steps from the start of learning on."""
    calls, phases, update = [], [], module.update
    monkeypatch.setattr(module, "gradients", no_gradients(calls))
    monkeypatch.setattr(module, "update", lambda *inputs: (phases.append(len(calls)), update(*inputs))[1])
    ratio = {"train_frequency": every} if hasattr(module.Args, "train_frequency") else {"utd": 1 / every}
    changes = ratio | {"num_envs": num_envs, "batch_size": 3, "learning_starts": 48, "total_timesteps": 96}
    args = tiny_args(module, tmp_path, eval_episodes=0, **changes)
    assert args.iteration_steps <= 24 and 48 % args.iteration_steps == 0
    module.main(args)
    of_critics = [data for loss, data in calls if "policy" not in loss]
    first = int(hasattr(module, "PrioritizedReplay"))  # behind the noise, which is no part of a minibatch
    assert len(of_critics) == 48 // every and all(len(x) == 3 for data in of_critics for x in data[first:])
    assert len(phases) == 48 // args.iteration_steps, "one learning phase an iteration"
    if hasattr(module.Args, "utd"):
        delay = getattr(args, "policy_frequency", 1)
        pattern = [*["critic"] * delay, "policy"] * (len(of_critics) // delay)
        kinds = ["policy" if "policy" in loss else "critic" for loss, _ in calls]
        assert kinds[: len(pattern)] == pattern and "policy" not in kinds[len(pattern) :]


SIZES = [(4, 20), (4, 8), (6, 2), (2, 10)]
RARELY = [(*case.values, *sizes) for case in agents_with("update_target") for sizes in SIZES]
RARELY = [case for case in RARELY if case[2] == 20 or "atari" not in case[0].__name__]  # pictures take their time


@pytest.mark.parametrize("module, train_frequency, frequency", RARELY, ids=lambda x: getattr(x, "__name__", x))
def test_the_target_network_moves_when_it_is_due(module, train_frequency, frequency, tmp_path, monkeypatch):
    """After an iteration that learned, if its steps passed a multiple of `frequency`; by tau of the way."""
    move, update, phases, moved = module.update_target, module.update, [], []

    def watch(agent, tau):
        moved.append(len(phases))
        network, follower = list(agent.q_network.parameters()), list(agent.target_network.parameters())
        for param in network:
            param.data += 1
        expected = [old + 0.25 * (new - old) for old, new in zip(follower, network)]
        move(agent, tau)
        torch.testing.assert_close([x.detach() for x in follower], [x.detach() for x in expected])

    monkeypatch.setattr(module, "gradients", no_gradients([]))
    monkeypatch.setattr(module, "update", lambda *inputs: (phases.append(len(moved)), update(*inputs))[1])
    monkeypatch.setattr(module, "update_target", watch)
    changes = {"train_frequency": train_frequency, "target_network_frequency": frequency, "tau": 0.25, "num_envs": 2}
    changes |= {"learning_starts": 12, "total_timesteps": 60, "batch_size": 3, "buffer_size": 60, "eval_episodes": 0}
    args = tiny_args(module, tmp_path, **changes)
    module.main(args)
    size = args.iteration_steps
    steps = range(12 + size, 61, size)  # the environment steps after each iteration that learned
    assert len(phases) == len(steps)
    assert moved == [n for n, step in enumerate(steps, 1) if step // frequency > (step - size) // frequency] != []


@pytest.mark.parametrize("module", agents_with("Actor") + agents_with("discrete_sac_policy_loss"))
def test_target_networks_follow_by_tau(module, tmp_path, monkeypatch):
    """One policy update after another, each of them by tau of the way."""
    update, moves = module.update, []

    def watch(agent, optimizers, replay, rollout, args, *rest):
        names = [name for name in ("critics", "critic", "actor") if hasattr(agent, f"target_{name}")]
        pairs = [(getattr(agent, name), getattr(agent, f"target_{name}")) for name in names]
        for one, _ in pairs:
            for param in one.parameters():
                param.data += 1
        before = [[x.clone() for x in target.parameters()] for _, target in pairs]
        metrics = update(agent, optimizers, replay, rollout, args, *rest)
        left = (1 - args.tau) ** (args.num_updates // getattr(args, "policy_frequency", 1))
        for (one, target), values in zip(pairs, before):
            for param, x, value in zip(one.parameters(), target.parameters(), values):
                moves.append((x - value).abs().max().item())
                torch.testing.assert_close(x, param + left * (value - param))
        return metrics

    monkeypatch.setattr(module, "gradients", no_gradients([]))
    monkeypatch.setattr(module, "update", watch)
    changes = {"tau": 0.1, "learning_starts": 8, "total_timesteps": 16, "batch_size": 2}
    module.main(tiny_args(module, tmp_path, eval_episodes=0, **changes))
    assert moves and min(moves) > 0.05


# ---- memory and resumption -------------------------------------------------------------------------------------------


@each_learner
def test_a_buffer_that_does_not_fit_is_refused(module, tmp_path, monkeypatch):
    with pytest.raises(module.UserError, match=f"--buffer-size {2**38}: .*GiB"):
        module.main(tiny_args(module, tmp_path, buffer_size=2**38))
    assert not (tmp_path / "run").exists()
    text = "MemTotal: 9 kB\nMemAvailable:     100000 kB\nBuffers: 1 kB\n"
    monkeypatch.setattr(module.Path, "open", lambda *_, **__: io.StringIO(text))
    monkeypatch.setattr(module.Path, "exists", lambda path: True)
    module.check_memory(module.Args(), 92_000_000, CPU)
    with pytest.raises(module.UserError):
        module.check_memory(module.Args(), 93_000_000, CPU)


@each_learner
def test_a_buffer_has_room_for_its_copy_in_a_checkpoint(module, tmp_path, monkeypatch):
    """Which a resumed run has already, as it has read it."""
    asked = []
    monkeypatch.setattr(module, "check_memory", lambda args, needed, device: asked.append(needed))
    args = tiny_args(module, tmp_path, num_envs=2, learning_starts=1, eval_episodes=0)
    args.total_timesteps = 2 * args.iteration_steps
    module.main(args)
    module.main(dataclasses.replace(args, checkpoint_buffer="always", run_dir=str(tmp_path / "second")))
    module.main(module.parse_args(["--resume", str(tmp_path / "second")]))
    assert asked[1] == 2 * asked[0] and asked[2] == asked[0] > 0


KEEPING = [(*case.values, keep) for case in LEARNERS for keep in ("auto", "never")]
KEEPING += [(*case.values, keep) for case in agents_with("update_target", "Replay") for keep in ("always", "auto, big")]


@pytest.mark.parametrize("module, keep", KEEPING, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_resumption_keeps_the_buffer_or_fills_it_anew(module, keep, tmp_path, monkeypatch, capsys):
    """Without the buffer, steps that count for nothing fill it before anything is learnt."""
    phases, acts, act, kept = [], [], module.act, keep in ("auto", "always")
    changes = {"num_envs": 2, "learning_starts": 30, "total_timesteps": 64, "eval_episodes": 0}
    changes |= {"train_frequency": 4} if hasattr(module.Args, "train_frequency") else {}
    if "big" in keep:
        monkeypatch.setattr(module.Replay, "buffers", lambda replay: [SimpleNamespace(nbytes=2**30 + 1)])
    monkeypatch.setattr(module, "act", lambda *inputs: (acts.append(1), act(*inputs)))

    def note(*inputs):
        replay = next(x for x in inputs if hasattr(x, "sample"))
        phases.append((len(acts), int(replay.complete) if hasattr(replay, "complete") else None))
        return {}

    monkeypatch.setattr(module, "update", note)
    args = tiny_args(module, tmp_path, checkpoint_buffer=keep.split(",")[0], **changes)
    module.main(args)
    saved = read_checkpoint(tmp_path / "run")
    assert ("replay" in saved) == kept and saved["global_step"] == 64
    learnt, T = len(phases), args.num_steps
    assert phases[0][0] == math.ceil(30 / args.iteration_steps) * T + T and phases[-1][0] == len(acts) == 32

    phases.clear(), acts.clear(), capsys.readouterr()
    args = module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "80"])
    assert module.main(args)["global_step"] == 80
    refill = 0 if kept else math.ceil(30 / args.iteration_steps) * T
    assert ("the replay buffer was not saved" in capsys.readouterr().err) != kept
    assert len(acts) == 8 + refill, "steps that count, and those that fill the buffer"
    assert [number for number, _ in phases] == [*range(refill + T, len(acts) + 1, T)]
    assert phases[0][1] is None or phases[0][1] == (32 if kept else refill) + T - 1, (
        "complete transitions of each environment"
    )
    assert learnt and read_checkpoint(tmp_path / "run")["global_step"] == 80


@pytest.mark.parametrize("module", agents_with("update_target", "Replay"))
def test_games_played_to_fill_the_buffer_count_for_nothing(module, tmp_path, monkeypatch):
    """Of two environments a game ends every fourth and every sixth row: at most three and two in eight rows."""
    monkeypatch.setattr(module, "make_envs", Script)
    changes = {"num_envs": 2, "learning_starts": 60, "train_frequency": 4, "eval_episodes": 0}
    module.main(tiny_args(module, tmp_path, checkpoint_buffer="never", total_timesteps=64, **changes))
    before = read_checkpoint(tmp_path / "run")["returns"]
    module.main(module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "80"]))
    added = len(read_checkpoint(tmp_path / "run")["returns"]) - len(before)
    assert len(before) == 8 + 5 and 2 <= added <= 5


@each_learner
def test_a_buffer_of_another_size_is_refused(module, tmp_path):
    args = tiny_args(module, tmp_path, num_envs=2, learning_starts=1, eval_episodes=0)
    args.total_timesteps = 2 * args.iteration_steps
    module.main(args)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    argv = ["--resume", str(tmp_path / "run"), "--total-timesteps", "160", "--buffer-size", "500"]
    with pytest.raises(module.UserError, match="--buffer-size"):
        module.main(module.parse_args(argv))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
