"""Rainbow's parts: prioritized replay of n-step transitions, noisy layers, and the loss; against lists and numpy."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import agent_named, tiny_args
from test_replay import scripted

rainbow = agent_named("rainbow_atari")
CPU, GAMMA = torch.device("cpu"), 0.9


def new_replay(N, size, n_step):
    """A prioritized buffer for `size` transitions of N scripted environments, whose pictures are 2 x 2."""
    obs, actions = torch.zeros(N, 4, 2, 2, dtype=torch.uint8), torch.zeros(N, dtype=torch.int64)
    rollout = SimpleNamespace(obs=obs, actions=actions, outcomes=torch.zeros(4, N))
    args = SimpleNamespace(num_envs=N, buffer_size=size, n_step=n_step, gamma=GAMMA)
    return rainbow.PrioritizedReplay(args, rollout, CPU)


def drawn(replay, count):
    """`count` transitions, one from the middle of each stretch of the priorities' sum; and their places."""
    *transitions, places = replay.sample(torch.full((1, count), 0.5, dtype=torch.float64))
    return transitions, places


class Steps:
    """Steps of all environments in plain lists, and the n-step transitions that a buffer of num_rows must hold."""

    def __init__(self):
        self.obs, self.outcomes, self.actions = [], [], []

    def held(self, num_rows, n_step) -> set:
        transitions, newest = set(), len(self.obs) - 1
        for row in range(max(0, newest - n_step - num_rows + 1), newest - n_step + 1):
            for n in np.flatnonzero(self.outcomes[row][2] == 0):
                last, total, discount = row, 0, 1
                while last - row < n_step and not self.outcomes[last][2][n]:
                    last += 1
                    total += discount * self.outcomes[last][0][n]
                    discount *= 0 if self.outcomes[last][1][n] else GAMMA
                pictures = self.obs[row][n].tobytes(), self.obs[last][n].tobytes()
                transitions.add((*pictures, int(self.actions[row][n]), f"{total:.4f}", f"{discount:.4f}"))
        return transitions


@pytest.mark.parametrize("N, size, n_step", [(3, 40, 3), (1, 7, 1), (4, 20, 5)])
def test_windows_end_with_their_episodes(N, size, n_step):
    """Over laps of the ring, after every step: every transition there is, and no other, each as often as the next."""
    rng, replay, steps = np.random.default_rng(size), new_replay(N, size, n_step), Steps()
    rows = math.ceil(size / N)
    for number, (obs, outcomes) in zip(range(4 * rows + 20), scripted(rainbow, N, rng)):
        actions = rng.integers(5, size=N)
        replay.store(torch.tensor(obs), torch.tensor(np.array(outcomes), dtype=torch.float32))
        replay.remember(torch.tensor(actions))
        steps.obs.append(obs), steps.outcomes.append(np.array(outcomes, np.float32)), steps.actions.append(actions)
        if number >= n_step:
            expected = steps.held(rows, n_step)
            (obs, actions, returns, discounts, next_obs, priorities), _ = drawn(replay, 10 * len(expected))
            seen = Counter(
                (o.numpy().tobytes(), p.numpy().tobytes(), int(a), f"{r + 0.0:.4f}", f"{d:.4f}")
                for o, a, r, d, p in zip(obs, actions, returns.double(), discounts, next_obs)
            )
            assert {(*key[:3], *(f"{float(x) + 0.0:.4f}" for x in key[3:])) for key in expected} == seen.keys()
            assert set(seen.values()) <= {9, 10, 11} and priorities.unique().tolist() == [1]
        if number % 13 == 12:  # a checkpoint, and back
            fresh = new_replay(N, size, n_step)
            fresh.load_state_dict(replay.state_dict())
            replay = fresh
    assert any(o[1].any() for o in steps.outcomes) and any((o[2] > o[1]).any() for o in steps.outcomes)


def test_transitions_are_drawn_as_often_as_their_priorities_say():
    rng, replay = np.random.default_rng(1), new_replay(3, 300, 3)
    for _, (obs, outcomes) in zip(range(90), scripted(rainbow, 3, rng)):
        replay.store(torch.tensor(obs), torch.tensor(np.array(outcomes), dtype=torch.float32))
    there = replay.priorities.flatten().nonzero().squeeze()
    assert len(there) > 100
    priorities = torch.rand(len(there)) ** 4
    replay.prioritize(there, priorities)
    assert replay.max_priority == 1, "the largest that there has been"
    (*_, found), places = drawn(replay, 50_000)
    assert torch.equal(found, replay.priorities.flatten()[places])
    expected = torch.zeros(replay.priorities.numel()).index_put((there,), 50_000 * priorities / priorities.sum())
    assert (torch.bincount(places, minlength=len(expected)) - expected).abs().max() <= 1.01

    at_random = replay.sample(torch.rand(1000, 32, dtype=torch.float64))[-1]
    frequencies = torch.bincount(at_random, minlength=len(expected)) / 32_000
    torch.testing.assert_close(frequencies, expected / 50_000, rtol=0.25, atol=2e-3)
    replay.prioritize(there[:1], torch.tensor([7.0]))
    obs, outcomes = next(scripted(rainbow, 3, rng))
    for _ in range(4):
        replay.store(torch.tensor(obs), torch.zeros(4, 3))
    newest = (replay.row - 3) % replay.num_rows
    assert replay.priorities[newest].tolist() == [7, 7, 7], "new transitions have the largest priority"


def test_the_rarest_is_drawn_from_a_million():
    """A sum of float32 would lose it."""
    replay = new_replay(1, 1_000_000, 3)
    replay.priorities.fill_(0.01)[0] = 1e6
    place = 900_000
    sums = replay.priorities.flatten().double().cumsum(0)
    random = 1 - (sums[place] - 0.005) / sums[-1]
    assert replay.sample(random[None, None])[-1].tolist() == [place]
    ends = torch.tensor([[0, 1 - 2**-53]], dtype=torch.float64)  # the least and the most that a draw can be
    assert replay.sample(ends)[-1].max() < replay.priorities.numel()


def test_an_empty_buffer_teaches_nothing():
    replay = new_replay(2, 20, 3)
    *transitions, places = replay.sample(torch.rand(1, 4, dtype=torch.float64))
    agent = SimpleNamespace(importance_exponent=torch.tensor(0.4), atoms=torch.linspace(-1, 1, 3))
    log_probs = torch.zeros(4, 2, 3, requires_grad=True)
    agent.q_network = agent.target_network = lambda obs, noise: log_probs.log_softmax(-1)
    network = lambda obs, noise: log_probs.softmax(-1) @ agent.atoms  # noqa: E731

    class Agent(SimpleNamespace):
        __call__ = staticmethod(network)

    args = SimpleNamespace(priority_exponent=0.5)
    loss, metrics = rainbow.rainbow_loss(Agent(**vars(agent)), args, [None] * 3, *transitions)
    assert loss == 0 and metrics["priorities"].tolist() == [0] * 4


def test_noise_is_that_of_weights_by_factors():
    """As if every weight had noise of its own, the product of its factors; one noise for all, or a row for each."""
    layer, generator = rainbow.NoisyLinear(5, 3).double(), torch.Generator().manual_seed(1)
    x, noise = torch.randn(7, 5).double(), torch.zeros(7, 8).double()
    rainbow.draw_factors(noise, generator)
    for rows in (noise, noise[0]):
        expected = []
        for i in range(7):
            inputs, outputs = (rows if rows.dim() == 1 else rows[i]).split([5, 3])
            weight = layer.weight + layer.weight_sigma * outputs[:, None] * inputs
            expected.append(weight @ x[i] + layer.bias + layer.bias_sigma * outputs)
        torch.testing.assert_close(layer(x, rows), torch.stack(expected))
    torch.testing.assert_close(layer(x, torch.zeros(8).double()), x @ layer.weight.T + layer.bias)
    assert layer.weight.abs().max() <= 5**-0.5 and torch.allclose(
        layer.weight_sigma, torch.tensor(0.1 * 5**-0.5).double()
    )


def test_factors_are_roots_of_normal_numbers():
    noise, generator = torch.zeros(3, 100_000), torch.Generator().manual_seed(1)
    rainbow.draw_factors(noise, generator)
    expected = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise * noise.abs(), expected)
    rollout = SimpleNamespace(act_noise=torch.zeros(1, 8), update_noise=torch.zeros(2, 2, 8), random=torch.zeros(2, 4))
    before = None
    for _ in range(2):
        rainbow.draw_noise(rollout, generator)
        now = torch.cat([x.flatten() for x in vars(rollout).values()])
        assert len(now.unique()) == len(now) and (before is None or not (now == before).any())
        assert rollout.random.min() >= 0 and rollout.random.max() < 1
        before = now


def test_streams_share_out_the_return():
    """The mean over the actions of what a network adds to its value is nothing; noise reaches all four noisy layers."""
    network = rainbow.QNetwork(4, 6, False)
    obs, noise = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8), torch.zeros(sum(network.noise_sizes))
    quiet = network(obs, noise)
    torch.testing.assert_close(quiet.exp().sum(-1), torch.ones(2, 4))
    features = network.network(obs / 255)
    streams = []
    for first, second in (network.value, network.advantage):
        hidden = (features @ first.weight.T + first.bias).relu()
        streams.append((hidden @ second.weight.T + second.bias).view(2, -1, 6))
    expected = streams[0] + streams[1] - streams[1].mean(1, keepdim=True)
    torch.testing.assert_close(quiet, expected.log_softmax(-1))
    for n, size in enumerate(network.noise_sizes):
        start = sum(network.noise_sizes[:n])
        loud = noise.clone()
        loud[start : start + size].normal_()
        assert not torch.allclose(network(obs, loud), quiet, atol=1e-4)
    rows = torch.stack([noise, noise + 1])
    torch.testing.assert_close(network(obs, rows)[0], quiet[0])


def test_the_loss_is_the_papers():
    """Double Q-learning's choice, projected targets of discounts and returns, weights, and the new priorities."""
    rng, num, atoms = np.random.default_rng(2), 30, np.linspace(-3, 3, 7)
    obs, next_obs, actions = rng.normal(size=(num, 4)), rng.normal(size=(num, 4)), rng.integers(3, size=num)
    returns, discounts, priorities = rng.normal(size=num), rng.choice([0, 0.9, 0.81], num), rng.random(num) + 0.1
    weights, targets = rng.normal(size=(2, 4, 3 * 7))

    def network(weights):
        return lambda x, noise: (x @ weights * noise).unflatten(-1, (3, 7)).log_softmax(-1)

    def probabilities(x, weights, noise):
        logits = np.exp((x @ weights * noise).reshape(3, 7))
        return logits / logits.sum(-1, keepdims=True)

    class Agent:
        importance_exponent, atoms = torch.tensor(0.6), torch.linspace(-3, 3, 7).double()
        q_network, target_network = (
            staticmethod(network(torch.tensor(weights))),
            staticmethod(network(torch.tensor(targets))),
        )
        __call__ = rainbow.Agent.forward

    args, noise, losses, q_values = SimpleNamespace(priority_exponent=0.5), torch.tensor([1.5, -0.7, 0.5]), [], []
    data = (obs, actions, returns, discounts, next_obs, priorities)
    loss, metrics = rainbow.rainbow_loss(Agent(), args, noise, *map(torch.tensor, data))
    for i in range(num):
        best = (probabilities(next_obs[i], weights, -0.7) @ atoms).argmax()
        after = probabilities(next_obs[i], targets, 0.5)[best]
        spread = returns[i] + discounts[i] * atoms
        goal = rainbow.project(*map(torch.tensor, (after[None], spread[None], atoms)))[0].numpy()
        probs = probabilities(obs[i], weights, 1.5)[actions[i]]
        losses.append(sum(g * np.log(g / p) for g, p in zip(goal, probs) if g)), q_values.append(probs @ atoms)
    scale = priorities**-0.6 / (priorities**-0.6).max()
    assert loss.item() == pytest.approx(np.mean(losses * scale))
    assert metrics["td_loss"].item() == pytest.approx(np.mean(losses))
    assert metrics["q_values"].item() == pytest.approx(np.mean(q_values))
    np.testing.assert_allclose(metrics["priorities"], (np.array(losses) + 1e-6) ** 0.5, rtol=1e-6)


def test_losses_become_priorities(tmp_path, monkeypatch):
    """In a run: of the transitions of every update, and the exponent of the weights rises towards 1."""
    update, exponents = rainbow.update, []

    def watched(agent, optimizer, replay, rollout, args):
        before, most = replay.priorities.clone(), replay.max_priority.item()
        places = replay.sample(rollout.random)[-1].unique()
        metrics = update(agent, optimizer, replay, rollout, args)
        changed = (before != replay.priorities).flatten().nonzero().squeeze(-1)
        assert (
            len(changed) and {*changed.tolist()} <= {*places.tolist()} and (replay.priorities[before == 0] == 0).all()
        )
        assert replay.max_priority >= most and replay.max_priority >= replay.priorities.max()
        exponents.append(agent.importance_exponent.item())
        return metrics

    monkeypatch.setattr(rainbow, "accelerate", lambda mode, *given: (acts(*given), lambda: watched(*given)))

    def acts(agent, optimizer, replay, rollout, args):
        return [lambda t=t: rainbow.act(agent, replay, rollout, t) for t in range(args.num_steps)]

    args = tiny_args(rainbow, tmp_path, num_envs=2, learning_starts=16, total_timesteps=48, train_frequency=4,
                     eval_episodes=0, importance_exponent=0.4)  # fmt: skip
    rainbow.main(args)
    assert exponents == pytest.approx([0.4 + 0.6 * step / 48 for step in range(16, 48, 4)])


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_is_noisy_unless_it_is_greedy(greedy):
    noises, N = [], 3

    class Agent:
        noise_size = 5

        def __call__(self, obs, noise):
            noises.append(noise.clone())
            return torch.tensor([[0.0, 1.0]]).expand(len(obs), -1)

    def step(actions):
        assert actions.tolist() == [1] * N
        over = np.full(N, len(noises) == 4)
        return (
            np.zeros((N, 1)),
            np.ones(N),
            over,
            ~over & False,
            {"reward": np.ones(N), "terminated": over, "lives": ~over},
        )

    envs = SimpleNamespace(num_envs=N, reset=lambda: (np.zeros((N, 1)), {}), step=step)
    assert rainbow.evaluate(Agent(), envs, torch.Generator().manual_seed(1), greedy) == [4.0] * N
    noises = torch.stack(noises)
    assert noises.shape == (4, N, 5) and len(noises.unique()) == (1 if greedy else noises.numel())


def test_priorities_that_are_not_finite_still_name_places():
    """The log finds a loss that is not finite only some updates later."""
    replay = new_replay(2, 20, 3)
    for _, (obs, outcomes) in zip(range(8), scripted(rainbow, 2, np.random.default_rng(1))):
        replay.store(torch.tensor(obs), torch.tensor(np.array(outcomes), dtype=torch.float32))
    _, places = drawn(replay, 4)
    replay.prioritize(places, torch.full((4,), float("nan")))
    assert drawn(replay, 4)[1].max() < replay.priorities.numel()
