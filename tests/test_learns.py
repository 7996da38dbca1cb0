"""Agents reach a score: seconds-long tasks always, longer ones with --slow."""

import pytest
from conftest import final_json


@pytest.mark.parametrize(
    "agent, env_id, timesteps, least",
    [
        ("ppo", "CartPole-v1", 200_000, 450),
        ("pqn", "CartPole-v1", 250_000, 450),
        pytest.param("ppo", "Acrobot-v1", 500_000, -90, marks=pytest.mark.slow),
    ],
)
def test_learns(agent, env_id, timesteps, least, cli):
    argv = ["--env-id", env_id, "--total-timesteps", timesteps, "--seed", "7", "--run-dir", "run", "--device", "cpu"]
    assert final_json(cli(agent, *argv))["eval_return_mean"] >= least
