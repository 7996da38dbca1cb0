"""Targets, losses, sampling and steps of the optimizer against a few lines of numpy or torch."""

import math
from contextlib import nullcontext
from functools import partial
from inspect import signature
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import agents_with, continuous

GAMMA, LAMBDA = 0.97, 0.9


def by_actions(*names, real):
    """The agents that have these names and choose among actions, or those whose actions are real numbers."""
    return [agent for agent in agents_with(*names) if continuous(agent.id) == real]


# ---- targets ---------------------------------------------------------------------------------------------------------


def rollout_with_resets(T, N, seed):
    """Rewards, values, terminations, dones [T + 1, N] as next-step autoreset makes them: every end, then a reset row.

    Row t of all but values is what the action of row t - 1 led to; the rewards of row 0 belong to the rollout before.
    """
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, T + 1, N))
    terminations, dones = np.zeros((2, T + 1, N))
    for n in range(N):
        dones[0, n] = rng.random() < 0.3  # an end that the rollout before saw
        for t in range(T):
            if dones[t, n]:  # the reset row: no reward, no end
                rewards[t + 1, n] = 0
            elif rng.random() < 0.2:
                dones[t + 1, n] = 1
                terminations[t + 1, n] = rng.random() < 0.5
    return rewards, values, terminations, dones


def numpy_gae(rewards, values, terminations, dones):
    advantages = np.zeros((len(rewards) - 1, *rewards.shape[1:]))
    following = 0
    for t in reversed(range(len(advantages))):
        delta = rewards[t + 1] + GAMMA * values[t + 1] * (1 - terminations[t + 1]) - values[t]
        following = advantages[t] = delta + GAMMA * LAMBDA * (1 - dones[t + 1]) * following
    return advantages


@pytest.mark.parametrize("module", agents_with("gae"))
@pytest.mark.parametrize("T", [1, 2, 7, 64, 129])
def test_gae_is_the_loop(module, T):
    data = rollout_with_resets(T, 5, seed=T)
    advantages = module.gae(*map(torch.tensor, data), GAMMA, LAMBDA)
    np.testing.assert_allclose(advantages, numpy_gae(*data), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("module", agents_with("gae"))
def test_gae_bootstraps_truncation_and_not_termination(module):
    rewards, values = torch.tensor([[9.0, 9.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    terminations, dones = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    advantages = module.gae(rewards, values, terminations, dones, 0.5, LAMBDA)
    assert advantages.tolist() == [[1.0, 6.0]]  # ended for good; cut off, so 1 + 0.5 * 10


def numpy_q_lambda(rewards, values, terminations, dones):
    targets, following = np.zeros((len(rewards) - 1, *rewards.shape[1:])), values[-1]
    for t in reversed(range(len(targets))):
        beyond = (1 - LAMBDA) * values[t + 1] + LAMBDA * following
        beyond = np.where(dones[t + 1], values[t + 1], beyond)
        following = targets[t] = rewards[t + 1] + GAMMA * np.where(terminations[t + 1], 0, beyond)
    return targets


@pytest.mark.parametrize("module", agents_with("q_lambda"))
@pytest.mark.parametrize("T", [1, 2, 7, 64, 129])
def test_q_lambda_is_the_loop(module, T):
    data = rollout_with_resets(T, 5, seed=T)
    targets = module.q_lambda(*map(torch.tensor, data), GAMMA, LAMBDA)
    np.testing.assert_allclose(targets, numpy_q_lambda(*data), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("module", agents_with("q_lambda"))
def test_q_lambda_bootstraps_truncation_and_not_termination(module):
    """And mixes one step with what follows where an episode goes on."""
    rewards, values = torch.ones(3, 3), torch.tensor([[5.0] * 3, [10.0] * 3, [20.0] * 3])
    terminations, dones = torch.tensor([[0.0] * 3, [1, 0, 0], [0] * 3]), torch.tensor([[0.0] * 3, [1, 1, 0], [0] * 3])
    targets = module.q_lambda(rewards, values, terminations, dones, 0.5, 0.25)
    # ended for good; cut off: 1 + 0.5 * 10; going on: 1 + 0.5 * (0.75 * 10 + 0.25 * the last row's 1 + 0.5 * 20)
    assert targets[0].tolist() == [1.0, 6.0, 6.125] and targets[1, 2] == 11


@pytest.mark.parametrize("module", agents_with("gae") + agents_with("q_lambda"))
def test_targets_end_with_their_episode(module):
    """What follows an end, reset row included, changes no target before it."""
    function = getattr(module, "gae", None) or module.q_lambda
    rewards, values, terminations, dones = map(torch.tensor, rollout_with_resets(40, 3, seed=1))
    before = function(rewards, values, terminations, dones, GAMMA, LAMBDA)
    t, n = map(int, torch.nonzero(dones[1:30])[0])
    rewards[t + 2 :, n] += 100
    values[t + 2 :, n] -= 100
    after = function(rewards, values, terminations, dones, GAMMA, LAMBDA)
    assert torch.equal(before[: t + 1, n], after[: t + 1, n])
    assert not torch.allclose(before[t + 1 :, n], after[t + 1 :, n])


# ---- acting ----------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A policy and values read from tables, so that a test can set them; outputs are logits, or a Gaussian's means."""

    def __init__(self, outputs, values):
        super().__init__()
        self.outputs, self.values = torch.nn.Parameter(outputs), torch.nn.Parameter(values)
        self.log_std = torch.nn.Parameter(torch.linspace(-1, 0.5, outputs.shape[-1], dtype=outputs.dtype))

    def policy(self, obs):
        return self.outputs[obs]

    def forward(self, obs):
        return self.outputs[obs], self.values[obs]


class QTable(torch.nn.Module):
    """Q-values read from a table, under an agent's own policy."""

    def __init__(self, module, outputs, epsilon=0.0):
        super().__init__()
        self.outputs, self.epsilon = torch.nn.Parameter(outputs), torch.tensor(epsilon)
        self.policy = partial(getattr(module.Agent, "policy", None), self) if hasattr(module.Agent, "policy") else None

    def forward(self, obs):
        return self.outputs[obs]


def act_once(module, agent, monkeypatch, num_envs=200_000, num_actions=4) -> SimpleNamespace:
    """The rollout after one step of acting at observation 0 in every environment."""
    rollout = SimpleNamespace(
        host_obs=torch.zeros(num_envs, dtype=torch.int64), obs=torch.ones(2, num_envs, dtype=torch.int64),
        host_actions=torch.zeros(num_envs, dtype=torch.int32), actions=torch.zeros(1, num_envs, dtype=torch.int64),
        gumbel=torch.zeros(1, num_envs, num_actions), permutations=torch.zeros(1, 4, dtype=torch.int64),
        logprobs=torch.zeros(1, num_envs), values=torch.zeros(2, num_envs),
        outcomes=torch.zeros(3, 2, num_envs), host_outcomes=torch.zeros(3, 2, num_envs), state=torch.zeros(1),
    )  # fmt: skip
    module.draw_noise(rollout, torch.Generator().manual_seed(1))
    if hasattr(module, "remember"):  # no memory but the observation
        monkeypatch.setattr(module, "remember", lambda agent, obs, state, dones: (obs.flatten(), state))
    takes_policy = "policy" in signature(module.act).parameters
    module.act(*((agent.policy,) if takes_policy else (module.sample_actions, agent)), rollout, 0)
    assert torch.equal(rollout.obs[0], rollout.host_obs)
    assert torch.equal(rollout.actions[0], rollout.host_actions.long()), "stored are the environments' own actions"
    return rollout


@pytest.mark.parametrize("module", by_actions("ppo_loss", real=False) + agents_with("ppo_rnd_loss"))
def test_actions_are_drawn_with_the_policys_frequencies(module, monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rollout = act_once(module, Table(logits, torch.tensor([7.0])), monkeypatch)
    frequencies = torch.bincount(rollout.actions[0], minlength=4) / rollout.actions.numel()
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), rtol=0, atol=0.005)
    if hasattr(module, "sample_actions"):  # stores what others compute after the rollout
        torch.testing.assert_close(rollout.logprobs, logits[0].log_softmax(-1)[rollout.actions])
        assert (rollout.values[0] == 7).all() and (rollout.values[1] == 0).all()


@pytest.mark.parametrize("module", agents_with("q_lambda"))
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_explores_as_often_as_told(module, epsilon, monkeypatch):
    agent = QTable(module, torch.tensor([[0.0, 1.0, 5.0, -1.0]]), epsilon)
    rollout = act_once(module, agent, monkeypatch)
    frequencies, expected = torch.bincount(rollout.actions[0], minlength=4) / 200_000, torch.full((4,), epsilon / 4)
    expected[2] += 1 - epsilon
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.005 if epsilon else 0)
    if hasattr(module, "sample_actions"):
        assert (rollout.values[0] == 5).all(), "the value of acting greedily"


@pytest.mark.parametrize("module", by_actions("ppo_loss", real=True))
def test_real_actions_are_gaussian_and_clipped_for_the_environment(module):
    outputs, nan, inf = torch.tensor([[0.5, -2.0], [0.0, 0.0], [0.0, 0.0]]), float("nan"), float("inf")
    agent = SimpleNamespace(normalize=lambda obs: obs, actor=lambda obs: outputs[obs], log_std=torch.tensor([-1, 0.5]))
    agent.low, agent.high = torch.tensor([[-1.0, -0.4], [1.0, 0.4]], dtype=torch.float64)
    policy = partial(module.Agent.policy, agent)
    obs, noise = torch.zeros(100_000, dtype=torch.int64), torch.randn(100_000, 2, generator=torch.Generator())
    actions, clipped = policy(obs, noise)
    torch.testing.assert_close(actions.mean(0), outputs[0], rtol=0, atol=0.02)
    torch.testing.assert_close(actions.std(0), agent.log_std.exp(), rtol=0.01, atol=0)
    assert actions.dtype == torch.float32 and clipped.dtype == torch.float64
    assert torch.equal(clipped, actions.double().clamp(agent.low, agent.high)), "0.4 is 0.4, not the float32 next to it"
    assert (clipped == agent.low).any() and (clipped == agent.high).any()
    assert torch.equal(policy(obs[:1])[0], outputs[:1]), "without noise the mean"

    outputs[1:] = broken = torch.tensor([[nan, 0.0], [inf, nan]])
    drawn, clipped = policy(torch.tensor([1, 2]), torch.zeros(2, 2))
    assert clipped.tolist() == [[-1, 0], [1, -0.4]], "an environment gets numbers within its bounds, whatever happens"
    assert torch.equal(drawn.isnan(), broken.isnan()), "and the loss gets what was drawn"


@pytest.mark.parametrize("module", agents_with("ppo_loss") + agents_with("ppo_rnd_loss") + agents_with("q_lambda"))
def test_noise_is_as_told_and_permutations_fresh_every_time(module):
    name = "noise" if continuous(module.__name__) else "gumbel"
    mean, variance = (0, 1) if continuous(module.__name__) else (np.euler_gamma, np.pi**2 / 6)
    rollout = SimpleNamespace(permutations=torch.zeros(3, 50, dtype=torch.int64), **{name: torch.zeros(100, 20, 10)})
    rollout.shifts = torch.zeros(3, 50, 2)  # of RPO
    noise, generator, before = getattr(rollout, name), torch.Generator().manual_seed(1), None
    for _ in range(2):
        module.draw_noise(rollout, generator)
        assert noise.isfinite().all()
        assert abs(noise.mean() - mean) < 0.03 and abs(noise.var() - variance) < 0.1
        assert (rollout.permutations.sort(1).values == torch.arange(50)).all()
        if before:
            assert not torch.equal(before[0], noise) and not torch.equal(before[1], rollout.permutations)
        before = noise.clone(), rollout.permutations.clone()


# ---- losses ----------------------------------------------------------------------------------------------------------


def minibatch(module, rows, seed):
    """What ppo_loss takes, as numpy's arrays by name; about one row in five is a reset row."""
    rng = np.random.default_rng(seed)
    return {
        "obs": np.arange(rows),
        "actions": rng.normal(size=(rows, 3)) if continuous(module.__name__) else rng.integers(3, size=rows),
        "logprobs": -rng.exponential(size=rows),
        "values": rng.normal(size=rows),
        "advantages": rng.normal(size=rows),
        "valid": (rng.random(rows) < 0.8).astype(float),
    }


def tensors(data: dict) -> dict:
    """The same as torch has them in a run: real numbers are float32."""
    return {k: torch.tensor(v, dtype=torch.float32 if v.dtype == float else None) for k, v in data.items()}


def numbers(metrics: dict) -> dict:
    return {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("module", agents_with("ppo_loss"))
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_is_the_papers(module, norm_adv, clip_vloss):
    rows, clip = 50, 0.2
    args = module.Args(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=clip, ent_coef=0.03, vf_coef=0.7)
    rng, data = np.random.default_rng(0), minibatch(module, rows, seed=1)
    new_values = rng.normal(size=rows)
    agent = Table(torch.tensor(rng.normal(size=(rows, 3))).float(), torch.tensor(new_values).float())
    new_logprobs, entropies, _ = module.evaluate_actions(agent, data["obs"], tensors(data)["actions"])
    data["logprobs"] = new_logprobs.detach().numpy() + rng.normal(size=rows) / 3
    loss, metrics = module.ppo_loss(agent, args, **tensors(data))

    keep = data["valid"] == 1  # numpy leaves the reset rows out instead of giving them no weight
    ratio = np.exp(new_logprobs.detach().numpy() - data["logprobs"])[keep]
    advantages, values = data["advantages"][keep], data["values"][keep]
    returns = advantages + values
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss = -np.minimum(advantages * ratio, advantages * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    v_error = (new_values[keep] - returns) ** 2
    if clip_vloss:
        v_error = np.maximum(v_error, (values + np.clip(new_values[keep] - values, -clip, clip) - returns) ** 2)
    expected = {"policy_loss": pg_loss, "value_loss": 0.5 * v_error.mean()}
    expected |= {"entropy": entropies.detach().numpy()[keep].mean(), "clipfrac": (abs(ratio - 1) > clip).mean()}
    expected["approx_kl"] = (ratio - 1 - np.log(ratio)).mean()
    assert numbers(metrics) == pytest.approx(expected, rel=1e-4)
    total = pg_loss + 0.7 * expected["value_loss"] - 0.03 * expected["entropy"]
    assert loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("module", agents_with("ppo_loss"))
def test_reset_rows_teach_nothing(module):
    rows = 30
    data = tensors(minibatch(module, rows, seed=2))
    reset = data["valid"] == 0
    assert reset.any()
    gradients = []
    for spoil in (0.0, 5.0):
        for name in ("logprobs", "values", "advantages"):
            data[name][reset] += spoil
        agent = Table(torch.linspace(-1, 1, rows * 3).view(rows, 3), torch.linspace(-1, 1, rows))
        module.ppo_loss(agent, module.Args(), **data)[0].backward()
        gradients.append((agent.outputs.grad, agent.values.grad))
    for clean, spoilt in zip(*gradients):
        assert torch.equal(clean, spoilt)
        assert (clean[reset] == 0).all() and (clean[~reset] != 0).any()


@pytest.mark.parametrize("module", by_actions("evaluate_actions", real=False))
def test_log_probabilities_and_entropy_are_the_categoricals(module):
    logits, actions = torch.randn(20, 5, dtype=torch.float64) * 3, torch.randint(5, (20,))
    agent = Table(logits, torch.randn(20, dtype=torch.float64))
    logprobs, entropy, values = module.evaluate_actions(agent, torch.arange(20), actions)
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs, categorical.log_prob(actions))
    torch.testing.assert_close(entropy, categorical.entropy())
    assert torch.equal(values, agent.values)


@pytest.mark.parametrize("module", by_actions("evaluate_actions", real=True))
def test_log_densities_and_entropy_are_the_gaussians(module):
    agent = Table(torch.randn(20, 5, dtype=torch.float64), torch.randn(20, dtype=torch.float64))
    actions = torch.randn(20, 5, dtype=torch.float64) * 3
    logprobs, entropy, values = module.evaluate_actions(agent, torch.arange(20), actions)
    gaussian = torch.distributions.Independent(torch.distributions.Normal(agent.outputs, agent.log_std.exp()), 1)
    torch.testing.assert_close(logprobs, gaussian.log_prob(actions))
    torch.testing.assert_close(entropy, gaussian.entropy())
    assert torch.equal(values, agent.values)


@pytest.mark.parametrize("module", agents_with("td_loss"))
def test_td_loss_is_half_the_mean_squared_error_without_reset_rows(module):
    rows, rng = 40, np.random.default_rng(0)
    table = torch.tensor(rng.normal(size=(rows, 3)), requires_grad=True)
    actions, targets, valid = rng.integers(3, size=rows), rng.normal(size=rows), rng.random(rows) < 0.7
    targets[~valid] = 1e6
    data = map(torch.tensor, (np.arange(rows), actions, targets, valid.astype(float)))
    loss, metrics = module.td_loss(lambda obs: table[obs], *data)
    loss.backward()

    q_values = table.detach().numpy()[np.arange(rows), actions]
    errors = (q_values - targets)[valid]
    goal = {"td_loss": 0.5 * (errors**2).mean(), "q_values": q_values[valid].mean()}
    assert numbers(metrics) == pytest.approx(goal, rel=1e-9)
    assert loss.item() == metrics["td_loss"].item()
    expected = np.zeros((rows, 3))  # of each row that counts, the action taken alone
    expected[valid, actions[valid]] = errors / valid.sum()
    np.testing.assert_allclose(table.grad, expected, rtol=1e-9)


@pytest.mark.parametrize("module", agents_with("ppo_loss") + agents_with("td_loss"))
def test_a_minibatch_of_reset_rows_alone_is_finite_and_teaches_nothing(module):
    data = tensors(minibatch(module, 6, seed=3)) | {"valid": torch.zeros(6)}
    if hasattr(module, "ppo_loss"):
        agent = Table(torch.randn(6, 3), torch.randn(6))
        loss, _ = module.ppo_loss(agent, module.Args(), **data)
    else:
        agent = QTable(module, torch.randn(6, 3))
        loss, _ = module.td_loss(agent, data["obs"], data["actions"], data["values"], data["valid"])
    loss.backward()
    assert loss.item() == 0 and (agent.outputs.grad == 0).all()


def transitions(rows, seed, discrete):
    """A minibatch of a replay buffer as numpy's arrays: obs, actions, rewards, terminations, next_obs, valid."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(3, size=rows) if discrete else rng.uniform(-1, 1, size=(rows, 2))
    obs, next_obs, rewards = rng.normal(size=(rows, 4)), rng.normal(size=(rows, 4)), rng.normal(size=rows)
    terminations, valid = (rng.random(rows) < 0.3).astype(float), (rng.random(rows) < 0.8).astype(float)
    rewards[valid == 0] = 1e3  # would show
    return obs, actions, rewards, terminations, next_obs, valid


@pytest.mark.parametrize("module", agents_with("dqn_loss"))
def test_dqn_loss_is_the_papers(module):
    """Terminations do not bootstrap; all else does, from the target network's best action."""
    data = obs, actions, rewards, terminations, next_obs, valid = transitions(30, 1, discrete=True)
    weights, targets = np.random.default_rng(2).normal(size=(2, 4, 3))
    trained = torch.tensor(weights, requires_grad=True)
    agent = SimpleNamespace(q_network=lambda x: x @ trained, target_network=lambda x: x @ torch.tensor(targets))
    loss, metrics = module.dqn_loss(agent, SimpleNamespace(gamma=0.9), *map(torch.tensor, data))
    loss.backward()
    keep, goal = valid == 1, rewards + 0.9 * np.where(terminations, 0, (next_obs @ targets).max(-1))
    q_values = (obs @ weights)[np.arange(30), actions]
    errors = (q_values - goal)[keep]
    expected = {"td_loss": 0.5 * (errors**2).mean(), "q_values": q_values[keep].mean()}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9) and loss.item() == metrics["td_loss"].item()
    gradient = np.zeros((4, 3))
    for error, row in zip(errors, np.flatnonzero(keep)):
        gradient[:, actions[row]] += error * obs[row] / keep.sum()
    np.testing.assert_allclose(trained.grad, gradient, rtol=1e-9)


@pytest.mark.parametrize("module", agents_with("project"))
def test_project_shares_out_each_probability(module):
    """Between the two atoms next to its return, the nearer the more; beyond the last atoms to those; means stay."""
    rng, atoms = np.random.default_rng(3), np.linspace(-2, 4, 13)
    probs, returns = rng.dirichlet(np.ones(13), 20), rng.uniform(-4, 6, (20, 13))
    returns[0] = atoms
    expected = np.zeros((20, 13))
    for row, (some, where) in enumerate(zip(probs, returns)):
        for p, x in zip(some, where):
            place = (np.clip(x, -2, 4) + 2) / 0.5
            below, above = math.floor(place), math.ceil(place)
            expected[row, below] += p * (1 if above == below else above - place)
            expected[row, above] += p * (place - below)
    result = module.project(*map(torch.tensor, (probs, returns, atoms))).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-12)
    np.testing.assert_allclose(result[0], probs[0], atol=1e-12)
    np.testing.assert_allclose(result @ atoms, (probs * returns.clip(-2, 4)).sum(-1), atol=1e-12)


@pytest.mark.parametrize("module", agents_with("c51_loss"))
def test_c51_loss_is_the_papers(module):
    """The target's distribution is that of the target network's best action; terminations leave the reward alone."""
    data = obs, actions, rewards, terminations, next_obs, valid = transitions(30, 1, discrete=True)
    atoms, weights, targets = np.linspace(-3, 3, 7), *np.random.default_rng(2).normal(size=(2, 4, 3 * 7))

    def network(weights):
        return lambda x: (x @ weights).unflatten(-1, (3, 7)).log_softmax(-1)

    def probabilities(x, weights):
        logits = np.exp((x @ weights).reshape(-1, 3, 7))
        return logits / logits.sum(-1, keepdims=True)

    parts = network(torch.tensor(weights)), network(torch.tensor(targets)), torch.tensor(atoms)
    agent = SimpleNamespace(q_network=parts[0], target_network=parts[1], atoms=parts[2])
    loss, metrics = module.c51_loss(agent, SimpleNamespace(gamma=0.9), *map(torch.tensor, data))
    losses, q_values = [], []
    for i in np.flatnonzero(valid):
        after = probabilities(next_obs[i], targets)[0]
        best = after[(after @ atoms).argmax()]
        returns = rewards[i] + 0.9 * atoms * (1 - terminations[i])
        goal = module.project(*map(torch.tensor, (best[None], returns[None], atoms)))[0].numpy()
        probs = probabilities(obs[i], weights)[0, actions[i]]
        losses.append(-goal @ np.log(probs)), q_values.append(probs @ atoms)
    expected = {"td_loss": np.mean(losses), "q_values": np.mean(q_values)}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9) and loss.item() == metrics["td_loss"].item()


def linear_critics(seed):
    """Two Q-functions linear in [obs, actions], and their weights [2, 6], which have gradients."""
    weights = torch.tensor(np.random.default_rng(seed).normal(size=(2, 6)), requires_grad=True)

    def critics(obs, actions, members=2):
        return weights[:members] @ torch.cat([obs, actions], -1).T

    return weights, critics


def check_critic_loss(loss, metrics, weights, targets, data, next_actions, bonus):
    """A critics' loss against what it is for next actions [rows, 2] and a bonus [rows] to their values, in numpy."""
    obs, actions, rewards, terminations, next_obs, valid = data
    keep, inputs = valid == 1, np.concatenate([obs, actions], -1)
    values = (targets.detach().numpy() @ np.concatenate([next_obs, next_actions], -1).T).min(0) + bonus
    q_values = weights.detach().numpy() @ inputs.T
    errors = (q_values - rewards - 0.9 * np.where(terminations, 0, values))[:, keep]
    expected = {"q_loss": 0.5 * (errors**2).mean(-1).sum(), "q_values": q_values[:, keep].mean()}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9) and loss.item() == metrics["q_loss"].item()
    loss.backward()
    np.testing.assert_allclose(weights.grad, errors @ inputs[keep] / keep.sum(), rtol=1e-9)
    assert targets.grad is None


@pytest.mark.parametrize("module", agents_with("sac_critic_loss"))
def test_sac_losses_are_the_papers(module):
    data, noise = transitions(30, 1, discrete=False), np.random.default_rng(3).normal(size=(30, 2))
    obs, _, _, _, next_obs, valid = data
    (weights, critics), (targets, target_critics) = linear_critics(4), linear_critics(5)
    log_alpha, scale = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True), torch.tensor(0.3).double()
    agent = SimpleNamespace(critics=critics, target_critics=target_critics, log_alpha=log_alpha)
    agent.actor = lambda obs, noise: (obs[:, :2] * scale + noise, noise.sum(-1))
    *batch, torch_noise = map(torch.tensor, (*data, noise))
    loss, metrics = module.sac_critic_loss(agent, SimpleNamespace(gamma=0.9), *batch, torch_noise)
    next_actions, alpha = next_obs[:, :2] * scale.item() + noise, np.exp(-0.7)
    check_critic_loss(loss, metrics, weights, targets, data, next_actions, -alpha * noise.sum(-1))
    assert log_alpha.grad is None

    scale.requires_grad_()
    loss, metrics = module.sac_policy_loss(agent, batch[0], batch[-1], torch_noise)
    keep, q_weights = valid == 1, weights.detach().numpy()
    values = q_weights @ np.concatenate([obs, obs[:, :2] * scale.item() + noise], -1).T
    entropy = -noise.sum(-1)[keep].mean()
    expected = {"policy_loss": -alpha * entropy - values.min(0)[keep].mean(), "entropy": entropy, "alpha": alpha}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(alpha * (entropy + 2)), "too much entropy lowers alpha"
    slopes = (q_weights[values.argmin(0), 4:] * obs[:, :2]).sum(-1)
    assert scale.grad.item() == pytest.approx(-slopes[keep].mean()), "the policy climbs the lower Q-value"


def linear_sac(seed):
    """An agent whose logits and Q-values are linear in obs, and its parameters: policy, critics, targets, log_alpha."""
    sizes, rng = ((4, 3), (2, 4, 3), (2, 4, 3), ()), np.random.default_rng(seed)
    parts = [torch.tensor(rng.normal(size=size), requires_grad=True) for size in sizes]
    policy, *critics, log_alpha = parts
    actor, critics, target_critics = (lambda obs, part=part: obs @ part for part in (policy, *critics))
    known = {"critics": critics, "target_critics": target_critics, "log_alpha": log_alpha}
    return Mock(spec=list(known), side_effect=actor, **known), parts


def softmax(logits):
    """Probabilities of one row of logits."""
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize("module", agents_with("discrete_sac_critic_loss"))
def test_the_critic_loss_of_discrete_sac_is_the_papers(module):
    """A row at a time: expectations over the next actions, the lower of two values, the policy's entropy, no bonus
    beyond a termination, and nothing from reset rows.
    """
    data, (agent, parts) = transitions(30, 1, discrete=True), linear_sac(2)
    policy, weights, targets, log_alpha = (x.detach().numpy() for x in parts)
    loss, metrics = module.discrete_sac_critic_loss(agent, SimpleNamespace(gamma=0.9), *map(torch.tensor, data))
    loss.backward()
    losses, q_values, gradient, count = [], [], np.zeros((2, 4, 3)), data[-1].sum()
    for obs, action, reward, termination, next_obs, valid in zip(*data):
        if not valid:
            continue
        probs, value = softmax(next_obs @ policy), 0
        for a, p in enumerate(probs):
            value += p * (min(next_obs @ targets[0][:, a], next_obs @ targets[1][:, a]) - np.exp(log_alpha) * np.log(p))
        goal = reward if termination else reward + 0.9 * value
        errors = np.array([obs @ weights[0][:, action] - goal, obs @ weights[1][:, action] - goal])
        losses.append((errors**2).sum()), q_values.append((errors + goal).mean())
        gradient[:, :, action] += 2 * errors[:, None] * obs / count
    assert 0 < count < 30 and 0 < data[3][data[-1] == 1].sum() < count
    expected = {"q_loss": np.mean(losses), "q_values": np.mean(q_values)}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9) and loss.item() == metrics["q_loss"].item()
    np.testing.assert_allclose(parts[1].grad, gradient, rtol=1e-9)
    assert all(parts[i].grad is None for i in (0, 2, 3)), "only the critics are trained"


@pytest.mark.parametrize("module", agents_with("discrete_sac_policy_loss"))
def test_the_policy_loss_of_discrete_sac_is_the_papers_over_alpha(module):
    """A row at a time: the policy climbs the target critics' lower Q-value and its entropy; too much entropy lowers
    alpha.
    """
    (obs, *_, valid), (agent, parts) = transitions(30, 1, discrete=True), linear_sac(2)
    policy, _, targets, log_alpha = (x.detach().numpy() for x in parts)
    alpha, target_entropy, args = np.exp(log_alpha), 0.6 * np.log(3), SimpleNamespace(target_entropy_scale=0.6)
    loss, metrics = module.discrete_sac_policy_loss(agent, args, torch.tensor(obs), torch.tensor(valid))
    loss.backward()
    losses, entropies, gradient = [], [], np.zeros((4, 3))
    for row in obs[valid == 1]:
        probs = softmax(row @ policy)
        costs = alpha * np.log(probs) - np.minimum(row @ targets[0], row @ targets[1])
        losses.append(probs @ costs / alpha), entropies.append(-probs @ np.log(probs))
        gradient += np.outer(row, probs * (costs - probs @ costs)) / alpha / valid.sum()
    expected = {"policy_loss": np.mean(losses), "entropy": np.mean(entropies), "alpha": alpha}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(parts[0].grad, gradient, rtol=1e-9)
    assert parts[3].grad.item() == pytest.approx(alpha * (np.mean(entropies) - target_entropy))
    assert parts[1].grad is None and parts[2].grad is None, "the critics are not trained"


@pytest.mark.parametrize("module", agents_with("sac_critic_loss"))
def test_reset_rows_alone_teach_sac_nothing(module):
    data, noise = [*map(torch.tensor, transitions(8, 1, discrete=False))], torch.randn(8, 2).double()
    data[-1][:] = 0
    (weights, critics), (_, target_critics) = linear_critics(4), linear_critics(5)
    log_alpha, scale = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-0.7, 0.3))
    agent = SimpleNamespace(critics=critics, target_critics=target_critics, log_alpha=log_alpha)
    agent.actor = lambda obs, noise: (obs[:, :2] * scale + noise, noise.sum(-1) * scale)
    loss = module.sac_critic_loss(agent, SimpleNamespace(gamma=0.9), *data, noise)[0]
    loss = loss + module.sac_policy_loss(agent, data[0], data[-1], noise)[0]
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in (weights, log_alpha, scale))


@pytest.mark.parametrize("module", agents_with("discrete_sac_policy_loss"))
def test_reset_rows_alone_teach_discrete_sac_nothing(module):
    data, (agent, parts) = [*map(torch.tensor, transitions(8, 1, discrete=True))], linear_sac(2)
    data[-1][:] = 0
    args = SimpleNamespace(gamma=0.9, target_entropy_scale=0.6)
    loss = module.discrete_sac_critic_loss(agent, args, *data)[0]
    loss = loss + module.discrete_sac_policy_loss(agent, args, data[0], data[-1])[0]
    loss.backward()
    assert loss == 0 and all((parts[i].grad == 0).all() for i in (0, 1, 3))


@pytest.mark.parametrize("module", agents_with("discrete_sac_policy_loss"))
@pytest.mark.parametrize("scale", [0.6, 0.89])
def test_alpha_brings_the_entropy_of_discrete_sac_to_its_target(module, scale):
    """And the policy to the softmax of the lower Q-values over alpha, which is the best at this entropy."""
    agent, parts = linear_sac(2)
    obs, valid, args = torch.eye(4).double(), torch.ones(4).double(), SimpleNamespace(target_entropy_scale=scale)
    groups = [{"params": [parts[0]], "lr": 0.2}, {"params": [parts[3]], "lr": 0.02}]  # the policy keeps up with alpha
    optimizer = torch.optim.Adam(groups)
    for _ in range(600):
        optimizer.zero_grad()
        loss, metrics = module.discrete_sac_policy_loss(agent, args, obs, valid)
        loss.backward()
        optimizer.step()
    assert metrics["entropy"].item() == pytest.approx(scale * np.log(3), abs=1e-3)
    best = (agent.target_critics(obs).amin(0) / metrics["alpha"]).softmax(-1)
    torch.testing.assert_close(agent(obs).softmax(-1), best, rtol=0, atol=1e-3)


@pytest.mark.parametrize("module", agents_with("TwinCritics"))
def test_twin_critics_and_the_policy_share_an_encoder_that_the_critics_train(module):
    torch.manual_seed(0)
    agent, obs = module.Agent(3), torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    (first, second), logits, features = agent.critics(obs), agent(obs), agent.critics.encoder(obs)
    assert torch.equal(first, agent.critics.first(features)) and torch.equal(second, agent.critics.second(features))
    assert torch.equal(logits, agent.actor(features))
    assert not torch.equal(first, second), "started apart"
    assert torch.equal(torch.stack([first, second]), agent.target_critics(obs)), "as the targets started"
    parts = [list(part.parameters()) for part in (agent.critics, agent.target_critics, agent.actor)]
    assert len({x.data_ptr() for part in parts for x in part}) == 2 * len(parts[0]) + len(parts[2])
    (logits.sum() + agent.target_critics(obs).sum()).backward()
    assert all(x.grad is None for part in parts[:2] for x in part) and all(x.grad is not None for x in parts[2])


@pytest.mark.parametrize("module", agents_with("ddpg_critic_loss"))
def test_ddpg_losses_are_the_papers(module):
    """Those of TD3 with one critic, no noise on the target's actions and no smaller of two values."""
    data = obs, actions, rewards, terminations, next_obs, valid = transitions(30, 1, discrete=False)
    (weights, critics), (targets, target_critics) = linear_critics(4), linear_critics(5)
    agent = SimpleNamespace(
        critic=lambda *x: critics(*x, members=1)[0], target_critic=lambda *x: target_critics(*x, members=1)[0],
        actor=lambda obs: (0.9 * obs[:, :2]).tanh(), target_actor=lambda obs: (0.8 * obs[:, :2]).tanh(),
    )  # fmt: skip
    batch, keep = [*map(torch.tensor, data)], valid == 1
    loss, metrics = module.ddpg_critic_loss(agent, module.Args(gamma=0.9), *batch)
    first, target = weights[0].detach().numpy(), targets[0].detach().numpy()
    after = target @ np.concatenate([next_obs, np.tanh(0.8 * next_obs[:, :2])], -1).T
    q_values = first @ np.concatenate([obs, actions], -1).T
    errors = (q_values - (rewards + 0.9 * np.where(terminations, 0, after)))[keep]
    expected = {"q_loss": 0.5 * (errors**2).mean(), "q_values": q_values[keep].mean()}
    assert numbers(metrics) == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert weights.grad[0].abs().max() > 0 and targets.grad is None, "only the critic is trained"

    loss, metrics = module.ddpg_policy_loss(agent, batch[0], batch[-1])
    value = (first @ np.concatenate([obs, np.tanh(0.9 * obs[:, :2])], -1).T)[keep].mean()
    assert numbers(metrics) == pytest.approx({"policy_loss": -value}, rel=1e-9)


@pytest.mark.parametrize("module", agents_with("td3_critic_loss"))
def test_td3_losses_are_the_papers(module):
    data, noise = transitions(30, 1, discrete=False), 2 * np.random.default_rng(3).normal(size=(30, 2))
    obs, _, _, _, next_obs, valid = data
    (weights, critics), (targets, target_critics) = linear_critics(4), linear_critics(5)
    agent, scale = (
        SimpleNamespace(critics=critics, target_critics=target_critics),
        torch.tensor(0.9, dtype=torch.float64),
    )
    agent.actor = lambda obs: (scale * obs[:, :2]).tanh()
    agent.target_actor = lambda obs: (0.8 * obs[:, :2]).tanh()
    args = module.Args(gamma=0.9, policy_noise=0.4, noise_clip=0.5)
    *batch, torch_noise = map(torch.tensor, (*data, noise))
    loss, metrics = module.td3_critic_loss(agent, args, *batch, torch_noise)
    next_actions = np.clip(np.tanh(0.8 * next_obs[:, :2]) + np.clip(0.4 * noise, -0.5, 0.5), -1, 1)
    check_critic_loss(loss, metrics, weights, targets, data, next_actions, 0)

    scale.requires_grad_()
    loss, metrics = module.td3_policy_loss(agent, batch[0], batch[-1])
    keep, first, chosen = valid == 1, weights[0].detach().numpy(), np.tanh(0.9 * obs[:, :2])
    value = (first @ np.concatenate([obs, chosen], -1).T)[keep].mean()
    assert numbers(metrics) == pytest.approx({"policy_loss": -value}, rel=1e-9)
    assert loss.item() == metrics["policy_loss"].item()
    loss.backward()
    slopes = (first[4:] * (1 - chosen**2) * obs[:, :2]).sum(-1)
    assert scale.grad.item() == pytest.approx(-slopes[keep].mean()), "the policy climbs the first Q-value"


@pytest.mark.parametrize("module", agents_with("sac_critic_loss"))
def test_log_densities_are_those_of_a_squashed_gaussian(module):
    """Where tanh leaves digits to compare, and finite where it leaves none."""
    torch.manual_seed(0)
    agent = module.Agent((4,), [-1.0] * 2, [1.0] * 2).double()
    actor, heads = agent.actor, []
    actor.head.register_forward_hook(lambda layer, inputs, output: heads.append(output))
    actor.first.register_forward_pre_hook(lambda layer, inputs: inputs[0].double())  # the network casts to float32
    actor.head.register_forward_pre_hook(lambda layer, inputs: inputs[0].double())
    noise = torch.randn(50, 2, dtype=torch.float64)
    actions, logprobs = actor(torch.randn(50, 4), noise)
    mean, log_std = heads[0].chunk(2, -1)
    gaussian = torch.distributions.Normal(mean, (3.5 * log_std.tanh() - 1.5).exp())
    squashed = torch.distributions.TransformedDistribution(gaussian, torch.distributions.TanhTransform())
    torch.testing.assert_close(logprobs, squashed.log_prob(actions).sum(-1), rtol=1e-6, atol=1e-6)
    actor.head.bias.data[:2] = 60
    actions, logprobs = actor(torch.randn(50, 4), noise)
    assert (actions == 1).all() and logprobs.isfinite().all()


@pytest.mark.parametrize("module", agents_with("Critics"))
def test_critics_are_two_separate_networks(module):
    torch.manual_seed(0)
    critics, obs, actions = module.Agent((4,), [-1.0] * 2, [1.0] * 2).critics, torch.randn(7, 4), torch.randn(7, 2)
    for member in range(2):
        x = torch.cat([obs, actions], -1)
        for number, (weight, bias) in enumerate(zip(critics.weights, critics.biases)):
            x = (x.relu() if number else x) @ weight[member] + bias[member]
        torch.testing.assert_close(critics(obs, actions)[member], x[:, 0])
    assert not torch.equal(*critics(obs, actions)), "started apart"


@pytest.mark.parametrize("module", agents_with("Actor"))
@pytest.mark.parametrize("network", ["critics", "actor"])
def test_bf16_rounds_the_hidden_layers_and_nothing_else(module, network):
    obs, actions = torch.randn(64, 17), torch.randn(64, 6)

    def run(agent):
        if network == "critics":
            return (agent.critics if hasattr(agent, "critics") else agent.critic)(obs, actions)
        return agent.actor(obs, torch.zeros(64, 6))[0] if hasattr(module, "sac_policy_loss") else agent.actor(obs)

    outputs = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        agent = module.Agent((17,), [-1.0] * 6, [1.0] * 6, bf16)
        outputs[bf16] = run(agent)
        assert outputs[bf16].dtype == torch.float32 and all(p.dtype == torch.float32 for p in agent.parameters())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
            assert torch.equal(run(agent), outputs[False])
    apart = (outputs[True] - outputs[False]).abs().max() / outputs[False].std()
    assert 1e-5 < apart < 5e-2


# ---- the learning phase ----------------------------------------------------------------------------------------------


def whole_batches():
    """The agents whose update hands gradients() one minibatch of rows after the other: discrete actions, one rank.

    And no second reward: test_curiosity.py has the like for those.
    """
    modules = [case.values[0] for case in by_actions("gae", real=False) + agents_with("q_lambda")]
    chosen = [m for m in modules if "gradients" in signature(m.update).parameters and not hasattr(m, "sum_over_ranks")]
    chosen = [m for m in chosen if not hasattr(m, "ppo_rnd_loss")]
    return [pytest.param(module, id=module.__name__) for module in chosen]


@pytest.mark.parametrize("module", whole_batches())
def test_update_hands_every_row_with_its_own_target_to_the_loss(module):
    """Rows, actions and targets belong together, reset rows are marked, and every epoch has each row once."""
    T, N, epochs, minibatches = 6, 4, 2, 3
    rewards, values, terminations, dones = rollout_with_resets(T, N, seed=5)
    args = SimpleNamespace(gamma=GAMMA, gae_lambda=LAMBDA, q_lambda=LAMBDA, num_minibatches=minibatches)
    args.max_grad_norm, values = 1.0, torch.tensor(values).float()
    ids = torch.arange((T + 1) * N).view(T + 1, N)  # an observation is its place in the rollout
    outcomes = torch.tensor(np.stack([rewards, terminations, dones])).float()
    rollout = SimpleNamespace(
        obs=ids.clone(), host_obs=ids[-1].clone(), actions=torch.randint(3, (T, N)), values=values.clone(),
        host_outcomes=outcomes, outcomes=torch.zeros_like(outcomes), logprobs=torch.zeros(T, N),
        permutations=torch.stack([torch.randperm(T * N) for _ in range(epochs)]),
    )  # fmt: skip
    rollout.obs[-1], rollout.values[-1] = -1, 0  # these are for update to fill, as are the outcomes
    outputs = torch.randn((T + 1) * N, 3)
    if hasattr(module, "gae"):
        agent, target_fn = Table(outputs, values.flatten().clone()), numpy_gae
    else:
        outputs += values.view(-1, 1) - outputs.amax(-1, keepdim=True)  # the largest Q-value is the value
        agent, target_fn = QTable(module, outputs), numpy_q_lambda
    targets = target_fn(rewards, values.numpy(), terminations, dones)
    seen = []

    def record(loss_fn, params, *inputs):
        seen.append([x for x in inputs if isinstance(x, torch.Tensor)])
        return [torch.zeros_like(p) for p in params], {"number": torch.tensor(float(len(seen)))}

    metrics = module.update(agent, torch.optim.SGD(agent.parameters(), 0.1), rollout, args, record)
    assert metrics["number"].item() == np.mean(range(1, epochs * minibatches + 1)) and metrics["grad_norm"] == 0
    assert len(seen) == epochs * minibatches
    flat = {"actions": rollout.actions.flatten(), "valid": 1 - outcomes[2, :-1].flatten()}
    for epoch in range(epochs):
        batch = [torch.cat(x) for x in zip(*seen[epoch * minibatches : (epoch + 1) * minibatches])]
        obs, actions, target, valid = batch[0], batch[1], batch[-2], batch[-1]
        assert torch.equal(obs, rollout.permutations[epoch])
        assert torch.equal(actions, flat["actions"][obs]) and torch.equal(valid, flat["valid"][obs])
        np.testing.assert_allclose(target, targets.flatten()[obs], rtol=1e-4, atol=1e-5)
        if hasattr(module, "gae"):
            torch.testing.assert_close(batch[3], values.flatten()[obs])


@pytest.mark.parametrize("module", agents_with("gradients"))
def test_gradients_are_those_of_backward(module):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 2, 2)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    params = [weight, torch.full((5,), 0.1, requires_grad=True)]

    def loss_fn(images, weight, bias):
        loss = ((images * weight.contiguous()).sum() + bias.square().sum()).tanh()
        return loss, {"loss": loss, "twice": 2 * loss}

    grads, metrics = module.gradients(loss_fn, params, images, *params)
    loss, _ = loss_fn(images, *params)
    loss.backward()
    for param, grad in zip(params, grads):
        torch.testing.assert_close(grad, param.grad)
        assert grad.stride() == param.stride(), "fused Adam would otherwise mix the elements up, and say nothing"
    assert metrics["loss"] == loss and metrics["twice"] == 2 * loss
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("module", agents_with("step_optimizer"))
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_is_cut_to_the_norm_of_all_gradients_together(module, max_norm):
    params = [torch.ones(3, 4, requires_grad=True), torch.ones(5, requires_grad=True)]
    grads = [torch.full_like(params[0], 2.0), torch.full_like(params[1], -3.0)]
    norm = module.step_optimizer(torch.optim.SGD(params, 0.1), params, [g.clone() for g in grads], max_norm)
    expected = np.sqrt(12 * 4 + 5 * 9)
    assert norm.item() == pytest.approx(expected)
    for param, grad in zip(params, grads):
        torch.testing.assert_close(param, 1 - 0.1 * grad * min(1, max_norm / expected), rtol=1e-5, atol=1e-6)
