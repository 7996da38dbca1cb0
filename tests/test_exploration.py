"""Epsilon-greedy agents explore as often as they are told to, and not at all where they are evaluated greedily."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with

explorers = pytest.mark.parametrize("module", agents_with("epsilon_greedy"))


class Table:
    """Stands for an agent: the same Q-values at every observation, the second the largest."""

    def __init__(self, epsilon):
        self.epsilon = torch.tensor(epsilon)

    def __call__(self, obs):
        return torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(len(obs), -1)


def check_frequencies(actions, epsilon):
    expected = torch.full((4,), epsilon / 4)
    expected[1] += 1 - epsilon
    frequencies = torch.bincount(torch.as_tensor(actions).long(), minlength=4) / len(actions)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.005 if epsilon else 0)


@pytest.mark.parametrize("module", agents_with("update_target", "epsilon_greedy"))
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_random_with_probability_epsilon(module, epsilon):
    """One step of acting in many environments: played and stored are the same actions, with what came before them."""
    draws, stored = 200_000, {}
    rollout = SimpleNamespace(
        host_obs=torch.rand(draws, 1), obs=torch.zeros(draws, 1), host_outcomes=torch.rand(3, draws),
        outcomes=torch.zeros(3, draws), actions=torch.zeros(draws, dtype=torch.int64),
        host_actions=torch.zeros(draws, dtype=torch.int32), gumbel=torch.zeros(2, draws, 4), random=torch.zeros(1),
    )  # fmt: skip
    replay = SimpleNamespace(
        store=lambda obs, outcomes: stored.update(obs=obs.clone(), outcomes=outcomes.clone()),
        remember=lambda actions: stored.update(actions=actions.clone()),
    )
    module.draw_noise(rollout, torch.Generator().manual_seed(1))
    module.act(partial(module.Agent.policy, Table(epsilon)), replay, rollout, 1)
    assert torch.equal(stored["obs"], rollout.host_obs) and torch.equal(stored["outcomes"], rollout.host_outcomes)
    assert torch.equal(stored["actions"], rollout.host_actions.long())
    check_frequencies(rollout.host_actions, epsilon)


@explorers
def test_of_equal_q_values_one_is_taken(module):
    probabilities = module.epsilon_greedy(torch.zeros(1, 4), torch.tensor(0.2)).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.85, 0.05, 0.05, 0.05]]))


@explorers
@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_explores_by_epsilon_or_not_at_all(module, greedy, monkeypatch):
    played, N = [], 50_000
    if hasattr(module, "remember"):  # no memory but the observation
        monkeypatch.setattr(module, "remember", lambda agent, obs, state, dones: (obs[0], state))

    def step(actions):
        played.append(actions)
        over = np.full(N, len(played) == 4)
        return (
            np.zeros((N, 1)),
            np.ones(N),
            over,
            ~over & False,
            {"reward": np.ones(N), "terminated": over, "lives": ~over},
        )

    envs = SimpleNamespace(num_envs=N, reset=lambda: (np.zeros((N, 1)), {}), step=step)
    returns = module.evaluate(Table(0.4), envs, torch.Generator().manual_seed(1), greedy)
    assert returns == [4.0] * N
    check_frequencies(np.concatenate(played), 0.0 if greedy else 0.4)


@pytest.mark.parametrize(
    "fraction, expected",
    [
        (0.5, [1, 0.82, 0.64, 0.46, 0.28, 0.1, 0.1, 0.1, 0.1, 0.1]),
        (0.0, [0.1] * 10),
        (1.0, [1 - 0.09 * i for i in range(10)]),
    ],
)
@pytest.mark.parametrize("name", ["dqn", "pqn"])
def test_epsilon_falls_to_its_end_and_stays_there(name, fraction, expected, tmp_path, monkeypatch, capsys):
    """Training begins with start_e; end_e is reached after exploration_fraction, and what the evaluation plays with."""
    epsilons, module = [], agent_named(name)
    act, evaluate = module.act, module.evaluate

    def recorded_act(policy, *rest):
        if rest[-1] == 0:  # of the steps of each iteration
            epsilons.append(policy.__self__.epsilon.item())
        return act(policy, *rest)

    def recorded_evaluate(agent, *rest):
        epsilons.append(agent.epsilon.item())
        return evaluate(agent, *rest)

    monkeypatch.setattr(module, "act", recorded_act)
    monkeypatch.setattr(module, "evaluate", recorded_evaluate)
    sizes = {"num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    if name == "dqn":
        sizes = {"train_frequency": 16, "batch_size": 2, "learning_starts": 0}
    settings = sizes | {"num_envs": 2, "total_timesteps": 160, "eval_episodes": 1}
    settings |= {"end_e": 0.1, "exploration_fraction": fraction}
    module.main(module.Args(**settings, run_dir=str(tmp_path / "run")))
    assert epsilons == pytest.approx([*expected, 0.1])

    epsilons.clear(), capsys.readouterr()  # a longer run goes on with the epsilon of its own line, and says so
    module.main(module.parse_args(["--resume", str(tmp_path / "run"), "--total-timesteps", "320"]))
    onward = [np.interp(i / 20, (0, fraction), (1, 0.1)) for i in range(10, 20)]
    assert epsilons == pytest.approx([*onward, 0.1])
    told = f"the epsilon rises from {expected[-1]:.3g} to {onward[0]:.3g}" in capsys.readouterr().err
    assert told == (fraction == 1)
