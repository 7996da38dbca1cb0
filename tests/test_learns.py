"""Agents reach a score: seconds-long tasks always, longer ones with --slow."""

import pytest
from conftest import final_json, run_agent


@pytest.mark.parametrize(
    "agent, env_id, timesteps, least",
    [
        ("ppo", "CartPole-v1", 200_000, 450),
        ("pqn", "CartPole-v1", 250_000, 450),
        pytest.param("ppo", "Acrobot-v1", 500_000, -90, marks=pytest.mark.slow),
    ],
)
def test_learns(agent, env_id, timesteps, least, tmp_path):
    argv = ["--env-id", env_id, "--total-timesteps", str(timesteps), "--seed", "7", "--run-dir", "run"]
    assert final_json(run_agent(agent, *argv, cwd=tmp_path))["eval_return_mean"] >= least
