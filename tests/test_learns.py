"""Agents reach a score: seconds-long tasks always, longer ones with --slow."""

import pytest
from conftest import agent_named, agents_with, final_json
from test_recurrent import Recall


@pytest.mark.parametrize(
    "agent, env_id, timesteps, least",
    [
        ("ppo", "CartPole-v1", 200_000, 450),
        pytest.param("pqn", "CartPole-v1", 500_000, 450, marks=pytest.mark.slow),
        pytest.param("ppo", "Acrobot-v1", 500_000, -90, marks=pytest.mark.slow),
    ],
)
def test_learns(agent, env_id, timesteps, least, cli):
    argv = ["--env-id", env_id, "--total-timesteps", timesteps, "--seed", "7", "--run-dir", "run", "--device", "cpu"]
    assert final_json(cli(agent, *argv))["eval_return_mean"] >= least


class Sides(Recall):
    """Recall after two dark pictures: a stack of four shows the side. As in envpool, the first one fills a stack."""

    delay = 2

    def step(self, actions):
        starting = self.elapsed > self.delay
        _, *rest = super().step(actions)
        self.obs[starting] = self.obs[starting][:, -1:]
        return self.obs.copy(), *rest


in_both_precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])  # on a GPU, bf16 is the default


@pytest.mark.slow
@in_both_precisions
@pytest.mark.parametrize("module", agents_with("FrameReplay") + agents_with("PrioritizedReplay"))
def test_learns_from_replayed_pictures(module, precision, monkeypatch, tmp_path):
    """Perfect is 1 and guessing 0: stacks, actions and rewards from the replay buffer belong together."""
    monkeypatch.setattr(module, "make_envs", lambda args, num_envs, seed: Sides(num_envs, seed, 4))
    sizes = {"buffer_size": 3_000, "learning_starts": 200, "total_timesteps": 3_000, "batch_size": 16}
    sizes |= {"target_network_frequency": 100, "eval_episodes": 200, "exploration_fraction": 0.5, "end_e": 0.05}
    sizes |= dict.fromkeys(("learning_rate", "q_lr", "policy_lr"), 5e-4) | {"precision": precision}
    chosen = {name: value for name, value in sizes.items() if hasattr(module.Args, name)}
    args = module.Args(**chosen, eval_greedy=True, torch_threads=1, device="cpu", run_dir=str(tmp_path / "run"))
    assert module.main(args)["eval_return_mean"] > 0.9


@pytest.mark.slow
@in_both_precisions
@pytest.mark.parametrize("agent", ["ppo_atari", "pqn_atari"])
def test_learns_from_pictures(agent, precision, monkeypatch, tmp_path):
    module = agent_named(agent)
    monkeypatch.setattr(module, "make_envs", lambda args, num_envs, seed: Sides(num_envs, seed, 4))
    sizes = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 6_144, "learning_rate": 5e-4}
    args = module.Args(**sizes, precision=precision, eval_episodes=200, eval_greedy=True, torch_threads=1,
                       device="cpu", run_dir=str(tmp_path / "run"))  # fmt: skip
    assert module.main(args)["eval_return_mean"] > 0.9
