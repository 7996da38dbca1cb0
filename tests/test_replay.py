"""The replay buffers give back what went in: every transition, whole, as often as every other, and no reset row."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import agents_with, read_checkpoint, tiny_args


def scripted(T, N, seed, first=0):
    """T steps of N environments that number their observations; every end is followed by a reset row.

    Returns obs [T + 1, N, 2], actions, rewards, terminations [T, N], dones [T + 1, N], and as tuples of numbers the
    transitions that must be held afterwards, in their order.
    """
    rng, expected = np.random.default_rng(seed), []
    obs = np.stack(np.meshgrid(np.arange(first, first + T + 1), np.arange(N), indexing="ij"), axis=-1).astype(
        np.float32
    )
    actions, rewards = rng.integers(5, size=(T, N)), rng.normal(size=(T, N)).astype(np.float32)
    dones, terminations = np.zeros((T + 1, N), np.float32), np.zeros((T, N), np.float32)
    for t in range(T):
        for n in range(N):
            if dones[t, n]:
                continue
            dones[t + 1, n] = rng.random() < 0.3
            terminations[t, n] = dones[t + 1, n] and rng.random() < 0.5
            row = [*obs[t, n], actions[t, n], rewards[t, n], terminations[t, n], *obs[t + 1, n]]
            expected.append(tuple(map(float, row)))
    return [torch.tensor(x) for x in (obs, actions, rewards, terminations, dones)], expected


def held(batch) -> list[tuple]:
    """The transitions of a sample as tuples of numbers."""
    rows = torch.cat([x.double().reshape(len(batch[0]), -1) for x in batch], dim=1)
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize("module", agents_with("Replay"))
def test_every_transition_comes_back_and_no_reset_row(module):
    """Over several laps of the ring, which holds the newest: s, a, r, whether it ended there, and s'."""
    T, N, size, expected = 5, 3, 40, []
    rows = {"obs": torch.zeros(T + 1, N, 2), "actions": torch.zeros(T, N, dtype=torch.int64)}
    rollout = SimpleNamespace(**rows, rewards=torch.zeros(T, N), terminations=torch.zeros(T, N))
    replay = module.Replay(size, rollout, torch.device("cpu"))
    for lap in range(12):
        (obs, actions, rewards, terminations, dones), new = scripted(T, N, seed=lap, first=100 * lap)
        expected += new
        transitions = obs[:-1], actions, rewards, terminations, obs[1:]
        replay.store([x.flatten(0, 1) for x in transitions], (dones[:-1] == 0).flatten())
        kept = expected[-size:]
        assert sorted(held(replay.sample(torch.arange(len(kept))))) == sorted(kept)
        assert set(held(replay.sample(torch.arange(1000) * 7919))) == set(kept)
    assert len(expected) > 3 * size and replay.stored == len(expected)


@pytest.mark.parametrize("module", agents_with("collect"))
def test_training_stores_what_the_environments_did(module, tmp_path, monkeypatch):
    """The buffer of a run, after every iteration and over several laps: for frames, stacks equal envpool's own, across
    lost lives, ends of games and time limits.
    """
    expected, ends, collect, size = [], [], module.collect, 60

    def check(replay, rollout):
        collect(replay, rollout)
        rows = rollout.obs[:-1], rollout.actions, rollout.rewards, rollout.terminations, rollout.obs[1:]
        valid = rollout.dones[:-1].flatten() == 0
        expected.extend(zip(*(x.flatten(0, 1)[valid].clone() for x in rows)))
        ends.extend(rollout.dones[1:].flatten().tolist())
        if hasattr(module, "Replay"):
            held, start = min(size, len(expected)), max(0, len(expected) - size) % size  # row of the oldest one
        else:
            held, start = int(replay.stored - replay.before[(replay.written + 4) % replay.num_rows]), 0
            assert held >= min(size, len(ends)) - sum(ends), "all that is promised, but for reset rows"
        batch = zip(*replay.sample(start + torch.arange(held)))
        for one, other in zip(batch, expected[-held:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other))

    monkeypatch.setattr(module, "collect", check)
    # a frame skip with which games end, by the time limit of 270 steps as well
    changes = {"frame_skip": 400} if "atari" in module.__name__ else {}
    changes |= {"buffer_size": size, "total_timesteps": 800, "learning_starts": 780, "eval_episodes": 0}
    module.main(tiny_args(module, tmp_path, **changes))
    assert len(expected) > 5 * size and sum(ends) > 2


@pytest.mark.parametrize("module", agents_with("Replay"))
def test_every_transition_is_drawn_as_often(module):
    rollout = SimpleNamespace(obs=torch.zeros(2, 1, 1), **dict.fromkeys(("actions", "rewards"), torch.zeros(1, 1)))
    rollout.terminations, draws = torch.zeros(1, 1), 400_000
    replay = module.Replay(64, rollout, torch.device("cpu"))
    replay.rewards[:] = torch.arange(65.0)
    for stored, number in ((10, 10), (64, 64), (1000, 64)):
        replay.stored.fill_(stored)
        random = torch.zeros(draws, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(1))
        counts = torch.bincount(replay.sample(random)[2].long(), minlength=65) / draws
        torch.testing.assert_close(counts[:number], torch.full((number,), 1 / number), rtol=0.1, atol=0)
        assert counts[number:].sum() == 0, "never what was not stored, nor the row of what is not to be kept"


@pytest.mark.parametrize("module", agents_with("collect"))
def test_noise_is_as_told_and_fresh_every_time(module):
    real = "continuous" in module.__name__
    rollout, generator, before = (
        SimpleNamespace(random=torch.zeros(100_000, dtype=torch.int64)),
        torch.Generator(),
        None,
    )
    drawn = ["noise", "update_noise"] if real else ["gumbel"]
    for name in drawn:
        setattr(rollout, name, torch.zeros(20, 1000, 3))
    for _ in range(2):
        module.draw_noise(rollout, generator)
        for name in drawn:
            x = getattr(rollout, name)
            assert abs(x.mean() - (0 if real else np.euler_gamma)) < 0.03
            assert abs(x.var() - (1 if real else np.pi**2 / 6)) < 0.05
        remainders = torch.bincount(rollout.random % 7, minlength=7) / 100_000
        torch.testing.assert_close(remainders, torch.full((7,), 1 / 7), rtol=0.05, atol=0)
        values = [rollout.random.clone(), *(getattr(rollout, name).clone() for name in drawn)]
        assert before is None or not any(torch.equal(a, b) for a, b in zip(before, values))
        before = values


@pytest.mark.parametrize("module", agents_with("follow"))
def test_actions_are_uniform_while_exploring_and_then_the_policys(module):
    low, high = torch.tensor([[-1.0, -3.0], [1.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    agent, obs, noise = module.Agent((4,), 2), torch.zeros(100_000, 4), torch.randn(100_000, 2)
    with torch.no_grad():
        actions, scaled = module.sample_actions(agent, obs, noise, torch.tensor(True), low, high)
        histogram = torch.histc(actions, 10, -1, 1) / actions.numel()
        torch.testing.assert_close(histogram, torch.full((10,), 0.1), rtol=0.05, atol=0)
        assert actions.dtype == torch.float32 and scaled.dtype == torch.float64
        torch.testing.assert_close(scaled, torch.stack([actions[:, 0], 2 * actions[:, 1] - 1], 1).double())

        actions, _ = module.sample_actions(agent, obs, noise, torch.tensor(False), low, high)
        if hasattr(agent, "exploration_noise"):
            assert (actions == agent.actor(obs)).all(), "without noise, as in the evaluation"
            agent.exploration_noise.fill_(0.25)
            actions, _ = module.sample_actions(agent, obs, noise, torch.tensor(False), low, high)
            torch.testing.assert_close(actions, (agent.actor(obs) + 0.25 * noise).clamp(-1, 1))
            torch.testing.assert_close(actions.std(0), torch.tensor([0.25, 0.25]), rtol=0.02, atol=0)
        else:
            torch.testing.assert_close(actions, agent.actor(obs, noise)[0])
        nan = torch.full_like(obs, float("nan"))
        drawn, scaled = module.sample_actions(agent, nan, noise, torch.tensor(False), low, high)
        assert drawn.isnan().all() and (scaled == low).all(), "an environment gets numbers, whatever happens"


# ---- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs, every", [(1, 1), (1, 4), (3, 2), (4, 1), (6, 4)])
@pytest.mark.parametrize("module", agents_with("collect"))
def test_every_step_is_followed_by_the_updates_it_owes(module, num_envs, every, tmp_path, monkeypatch):
    """One update for every `every` environment steps from the start of learning on, whatever num_envs is."""
    name, calls, updates, gradients = module.__name__, [], [], module.gradients

    def count(loss_fn, *inputs):
        calls.append(loss_fn.__name__)
        return gradients(loss_fn, *inputs)

    update = module.update
    monkeypatch.setattr(module, "gradients", count)
    monkeypatch.setattr(module, "update", lambda *inputs: (updates.append(len(calls)), update(*inputs)))
    ratio = {"train_frequency": every} if "dqn" in name else {"utd": 1 / every}
    changes = ratio | {"num_envs": num_envs, "batch_size": 2, "learning_starts": 48, "total_timesteps": 96}
    args = tiny_args(module, tmp_path, eval_episodes=0, **changes)
    assert args.iteration_steps <= 24 and 48 % args.iteration_steps == 0
    module.main(args)
    of_critics = [call for call in calls if "policy" not in call]
    assert len(of_critics) == 48 // every
    assert len(updates) == 48 // args.iteration_steps, "one learning phase an iteration"
    if "dqn" not in name:
        delay = getattr(args, "policy_frequency", 1)
        assert len(calls) - len(of_critics) == len(of_critics) // delay
        pattern = [*["critic"] * delay, "policy"]
        assert [call.split("_")[1] for call in calls] == pattern * (len(of_critics) // delay)


@pytest.mark.parametrize("module", agents_with("update_target"))
@pytest.mark.parametrize("train_frequency, frequency", [(4, 8), (4, 10), (3, 1), (1, 5)])
def test_the_target_network_moves_when_it_is_due(module, train_frequency, frequency):
    """Once in every `frequency` environment steps, or with every update if those are rarer; by tau of the way."""
    agent = SimpleNamespace(updates=torch.zeros((), dtype=torch.int64))
    agent.q_network, agent.target_network = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    args, moved = module.Args(train_frequency=train_frequency, target_network_frequency=frequency, tau=0.25), []
    for update in range(1, 21):
        agent.q_network.weight.data.fill_(1)
        agent.target_network.weight.data.fill_(0)
        module.update_target(agent, args)
        weight = agent.target_network.weight.item()
        assert weight in (0, 0.25)
        if weight:
            moved.append(update * train_frequency)
    steps = range(train_frequency, 20 * train_frequency + 1, train_frequency)
    expected = [step for step in steps if step // frequency > (step - train_frequency) // frequency]
    assert moved == expected and agent.updates == 20


@pytest.mark.parametrize("module", agents_with("follow"))
def test_target_networks_follow_by_tau(module):
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * one.weight + 0.1 * other.weight
    module.follow(one, other, 0.1)
    torch.testing.assert_close(one.weight, expected)


# ---- losses ----------------------------------------------------------------------------------------------------------


def transitions(rows, seed, discrete):
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=rows) if discrete else rng.uniform(-1, 1, size=(rows, 2))
    obs, next_obs, rewards = rng.normal(size=(rows, 4)), rng.normal(size=(rows, 4)), rng.normal(size=rows)
    return obs, actions, rewards, (rng.random(rows) < 0.3).astype(float), next_obs


@pytest.mark.parametrize("module", agents_with("dqn_loss"))
def test_dqn_loss_is_the_papers(module):
    """Terminations do not bootstrap; all else does, from the target network's best action."""
    obs, actions, rewards, terminations, next_obs = transitions(30, 1, discrete=True)
    weights, targets = np.random.default_rng(2).normal(size=(2, 4, 3))
    trained = torch.tensor(weights, requires_grad=True)
    agent = SimpleNamespace(q_network=lambda x: x @ trained, target_network=lambda x: x @ torch.tensor(targets))
    data = map(torch.tensor, (obs, actions, rewards, terminations, next_obs))
    loss, metrics = module.dqn_loss(agent, 0.9, *data)
    loss.backward()
    goal = rewards + 0.9 * np.where(terminations, 0, (next_obs @ targets).max(-1))
    q_values = (obs @ weights)[np.arange(30), actions]
    np.testing.assert_allclose(metrics, [0.5 * ((q_values - goal) ** 2).mean(), q_values.mean()], rtol=1e-9)
    expected = np.zeros((4, 3))
    for row in range(30):
        expected[:, actions[row]] += (q_values - goal)[row] * obs[row] / 30
    np.testing.assert_allclose(trained.grad, expected, rtol=1e-9)


def linear_critics(seed):
    """Two Q-functions linear in [obs, actions], and their weights [2, 6]."""
    weights = np.random.default_rng(seed).normal(size=(2, 6))
    return weights, lambda obs, actions, members=2: torch.tensor(weights[:members]) @ torch.cat([obs, actions], -1).T


@pytest.mark.parametrize("module", agents_with("sac_critic_loss"))
def test_sac_losses_are_the_papers(module):
    data, noise = transitions(30, 1, discrete=False), np.random.default_rng(3).normal(size=(30, 2))
    obs, actions, rewards, terminations, next_obs = data
    (weights, critics), (targets, target_critics) = linear_critics(4), linear_critics(5)
    log_alpha, scale = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True), 0.3
    agent = SimpleNamespace(critics=critics, target_critics=target_critics, log_alpha=log_alpha)
    agent.actor = lambda obs, noise: (obs[:, :2] * scale + noise, noise.sum(-1))
    tensors = [torch.tensor(x) for x in (*data, noise)]
    loss, metrics = module.sac_critic_loss(agent, 0.9, *tensors)
    chosen = np.concatenate([next_obs, next_obs[:, :2] * scale + noise], -1)
    values = (targets @ chosen.T).min(0) - np.exp(-0.7) * noise.sum(-1)
    goal = rewards + 0.9 * np.where(terminations, 0, values)
    q_values = weights @ np.concatenate([obs, actions], -1).T
    expected = 0.5 * ((q_values - goal) ** 2).mean(-1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(metrics, [expected, q_values.mean()], rtol=1e-9)

    loss, metrics = module.sac_policy_loss(agent, tensors[0], tensors[-1])
    values = (weights @ np.concatenate([obs, obs[:, :2] * scale + noise], -1).T).min(0)
    entropy = -noise.sum(-1).mean()
    of_policy = -np.exp(-0.7) * entropy - values.mean()
    np.testing.assert_allclose(metrics, [of_policy, entropy, np.exp(-0.7)], rtol=1e-9)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(np.exp(-0.7) * (entropy + 2)), "too much entropy lowers alpha"


@pytest.mark.parametrize("module", agents_with("sac_critic_loss"))
def test_log_densities_are_those_of_a_squashed_gaussian(module):
    """Where tanh leaves digits to compare, and finite where it leaves none."""
    torch.manual_seed(0)
    actor = module.Actor(4, 2).double()
    obs, noise = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    actions, logprobs = actor(obs, noise)
    mean, log_std = actor.head(actor.hidden[1](actor.hidden[0](obs).relu()).relu()).chunk(2, -1)
    gaussian = torch.distributions.Normal(mean, (3.5 * log_std.tanh() - 1.5).exp())
    squashed = torch.distributions.TransformedDistribution(gaussian, torch.distributions.TanhTransform())
    torch.testing.assert_close(logprobs, squashed.log_prob(actions).sum(-1), rtol=1e-6, atol=1e-6)
    actor.float().head.bias.data[:2] = 60
    actions, logprobs = actor(obs.float(), noise.float())
    assert (actions == 1).all() and logprobs.isfinite().all()


@pytest.mark.parametrize("module", agents_with("td3_critic_loss"))
def test_td3_losses_are_the_papers(module):
    data, noise = transitions(30, 1, discrete=False), 2 * np.random.default_rng(3).normal(size=(30, 2))
    obs, actions, rewards, terminations, next_obs = data
    (weights, critics), (targets, target_critics) = linear_critics(4), linear_critics(5)
    agent = SimpleNamespace(critics=critics, target_critics=target_critics)
    agent.actor = agent.target_actor = lambda obs: (0.9 * obs[:, :2]).tanh()
    args = module.Args(gamma=0.9, policy_noise=0.4, noise_clip=0.5)
    tensors = [torch.tensor(x) for x in (*data, noise)]
    loss, metrics = module.td3_critic_loss(agent, args, *tensors)
    chosen = np.clip(np.tanh(0.9 * next_obs[:, :2]) + np.clip(0.4 * noise, -0.5, 0.5), -1, 1)
    values = (targets @ np.concatenate([next_obs, chosen], -1).T).min(0)
    goal = rewards + 0.9 * np.where(terminations, 0, values)
    q_values = weights @ np.concatenate([obs, actions], -1).T
    expected = 0.5 * ((q_values - goal) ** 2).mean(-1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(metrics, [expected, q_values.mean()], rtol=1e-9)

    loss, metrics = module.td3_policy_loss(agent, tensors[0])
    first = weights[0] @ np.concatenate([obs, np.tanh(0.9 * obs[:, :2])], -1).T
    assert loss.item() == metrics.item() == pytest.approx(-first.mean(), rel=1e-9)


@pytest.mark.parametrize("module", agents_with("Critics"))
def test_critics_are_two_separate_networks(module):
    torch.manual_seed(0)
    critics, obs, actions = module.Critics(4, 2), torch.randn(7, 4), torch.randn(7, 2)
    for member in range(2):
        x = torch.cat([obs, actions], -1)
        for number, (weight, bias) in enumerate(zip(critics.weights, critics.biases)):
            x = (x.relu() if number else x) @ weight[member] + bias[member]
        torch.testing.assert_close(critics(obs, actions)[member], x[:, 0])
    torch.testing.assert_close(critics(obs, actions, members=1), critics(obs, actions)[:1])
    assert not torch.equal(*critics(obs, actions)), "started apart"


# ---- memory and resumption -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="nobody says how much memory is free")
@pytest.mark.parametrize("module", agents_with("collect"))
def test_a_buffer_that_does_not_fit_is_refused_and_what_would_is_said(module, tmp_path, capsys, monkeypatch):
    args = tiny_args(module, tmp_path, buffer_size=10_000_000)
    monkeypatch.setattr(module.Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:     100000 kB\n")
    with pytest.raises(SystemExit) as end:
        module.main(args)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "--buffer-size 10000000: takes" in message
    fits = int(re.search(r"(\d+) would fit", message)[1])
    assert 0 < fits < 10_000_000 and not (tmp_path / "run").exists()
    module.main(tiny_args(module, tmp_path, buffer_size=fits))
    assert "replay buffer: 0.08 GiB" in capsys.readouterr().err  # nearly all that is free


@pytest.mark.parametrize("module", agents_with("collect"))
@pytest.mark.parametrize("kept", [True, False])
def test_resumption_keeps_the_buffer_or_fills_it_anew(module, kept, tmp_path, monkeypatch, capsys):
    args = tiny_args(module, tmp_path, checkpoint_buffer=kept)
    first = module.main(args)["global_step"]
    saved, updates, update = read_checkpoint(tmp_path / "run"), [], module.update
    assert ("replay" in saved) == kept

    def record(agent, optimizer, replay, *rest):
        updates.append((int(replay.stored), {name: x.clone() for name, x in replay.state_dict().items()}))
        return update(agent, optimizer, replay, *rest)

    monkeypatch.setattr(module, "update", record)
    argv = ["--resume", str(tmp_path / "run"), "--total-timesteps", str(2 * first)]
    assert module.main(module.parse_args(argv))["global_step"] <= 2 * first
    told = "the replay buffer was not saved" in capsys.readouterr().err
    stored, state = updates[0]
    if kept:
        assert not told and stored > saved["replay"]["stored"]
        ring, before = state["rewards"], saved["replay"]["rewards"]
        same = (ring == before).flatten().float().mean()
        assert same > 0.5 and len(updates) == (2 * first - first) // args.iteration_steps
    else:
        assert told and args.learning_starts <= stored + 10 < 2 * args.learning_starts
        assert len(updates) < first // args.iteration_steps
