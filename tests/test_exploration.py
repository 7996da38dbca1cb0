"""Epsilon-greedy agents explore as often as they are told to."""

from types import SimpleNamespace

import pytest
import torch
from conftest import agent_named, agents_with

explorers = pytest.mark.parametrize("module", agents_with("epsilon_greedy"))


@explorers
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_random_with_probability_epsilon(module, epsilon):
    q_values, draws = torch.tensor([[0.0, 2.0, 1.0, -1.0]]), 200_000
    agent = SimpleNamespace(policy=lambda obs: module.epsilon_greedy(q_values[obs], torch.tensor(epsilon)))
    gumbel = torch.empty(draws, 4).exponential_(generator=torch.Generator().manual_seed(1)).log_().neg_()
    actions = module.sample_actions(agent, torch.zeros(draws, dtype=torch.int64), gumbel)
    expected = torch.full((4,), epsilon / 4)
    expected[1] += 1 - epsilon
    torch.testing.assert_close(torch.bincount(actions, minlength=4) / draws, expected, rtol=0, atol=0.005)
    assert epsilon or (actions == 1).all()


@explorers
def test_of_equal_q_values_one_is_taken(module):
    probabilities = module.epsilon_greedy(torch.zeros(1, 4), torch.tensor(0.2)).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.85, 0.05, 0.05, 0.05]]))


@pytest.mark.parametrize(
    "fraction, expected",
    [
        (0.5, [1, 0.82, 0.64, 0.46, 0.28, 0.1, 0.1, 0.1, 0.1, 0.1]),
        (0, [0.1] * 10),
        (1, [1 - 0.09 * i for i in range(10)]),
    ],
)
@pytest.mark.parametrize("name", ["dqn", "pqn"])
def test_epsilon_falls_to_its_end_and_stays_there(name, fraction, expected, tmp_path, monkeypatch):
    """Training begins with start_e; end_e is reached after exploration_fraction, and what the evaluation plays with."""
    epsilons, module = [], agent_named(name)

    def record(function):
        return lambda agent, *rest: (epsilons.append(agent.epsilon.item()), function(agent, *rest))[1]

    for function in ("update", "evaluate"):
        monkeypatch.setattr(module, function, record(getattr(module, function)))
    sizes = {"num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    if name == "dqn":
        sizes = {"train_frequency": 16, "batch_size": 2, "learning_starts": 0}
    settings = sizes | {"num_envs": 2, "total_timesteps": 160, "eval_episodes": 1}
    settings |= {"end_e": 0.1, "exploration_fraction": fraction}
    module.main(module.Args(**settings, run_dir=str(tmp_path / "run")))
    assert epsilons == pytest.approx([*expected, 0.1])
