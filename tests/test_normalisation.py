"""Running statistics of observations and rewards: numpy's, over all rows that count, frozen when a run is scored."""

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agents_with, final_json, read_checkpoint, tiny
from test_math import GAMMA, rollout_with_resets
from test_modes_agree import build

normalising = pytest.mark.parametrize("module", agents_with("Moments"))


@normalising
def test_moments_are_numpys_however_the_rows_arrive(module):
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.normal([3.0, -200.0, 0.0], [1.0, 5.0, 0.0], size=(90, 3)), dtype=torch.float32)
    valid = torch.tensor(rng.random(90) < 0.8, dtype=torch.float32)
    rows[valid == 0] = 1e6  # which would show
    valid[50:60] = 0  # a part without one row that counts
    moments = module.Moments(3)
    for part in (slice(0, 20), slice(20, 50), slice(50, 60), slice(60, 90)):
        moments.update(rows[part], valid[part])
    kept = rows[valid == 1].double().numpy()
    assert moments.count == len(kept)
    np.testing.assert_allclose(moments.mean, kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, kept.var(0), rtol=1e-4)


@normalising
def test_discounted_returns_are_the_loop_and_go_on_over_rollouts(module):
    rewards, _, _, dones = map(torch.tensor, rollout_with_resets(40, 5, seed=2))
    before = torch.randn(5, dtype=torch.float64)
    expected, running = [], before.numpy()
    for reward, reset in zip(rewards.numpy(), dones.numpy()):
        running = reward + GAMMA * running * (1 - reset)
        expected.append(running)
    whole = module.discounted_returns(rewards, dones, before, GAMMA)
    np.testing.assert_allclose(whole, expected, rtol=1e-9, atol=1e-12)
    for cut in (1, 17, 39):
        first = module.discounted_returns(rewards[:cut], dones[: cut + 1], before, GAMMA)
        second = module.discounted_returns(rewards[cut:], dones[cut:], first[-1], GAMMA)
        torch.testing.assert_close(torch.cat([first, second]), whole)


def learn_from(it, number):
    """A rollout of random data through the learning phase; returns what was in it."""
    rng, rollout = np.random.default_rng(number), it.rollout
    rewards, _, terminations, dones = rollout_with_resets(*rollout.rewards.shape, seed=number)
    data = {"obs": rng.normal(3, 2, size=rollout.obs.shape), "rewards": rewards, "dones": dones}
    rollout.obs.copy_(torch.tensor(data["obs"]))
    rollout.host_obs.copy_(rollout.obs[-1])
    rollout.actions.normal_(generator=torch.Generator().manual_seed(number))
    for name, values in (("rewards", rewards), ("terminations", terminations), ("dones", dones)):
        getattr(rollout, f"host_{name}").copy_(torch.tensor(values))
    it.module.draw_noise(rollout, torch.Generator().manual_seed(number))
    it.learn()
    return data


@normalising
def test_the_learning_phase_takes_in_each_row_that_counts_once(module):
    """Three rollouts, whose statistics are those of all rows but the reset rows; returns go on from one to the next."""
    it = build(module, "eager", "cpu", gamma=GAMMA)
    rollouts = [learn_from(it, number) for number in range(3)]
    valid = np.concatenate([r["dones"][:-1] for r in rollouts]) == 0
    obs = np.concatenate([r["obs"][:-1] for r in rollouts])[valid]
    np.testing.assert_allclose(it.agent.obs_moments.mean, obs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(it.agent.obs_moments.var, obs.var(0), rtol=1e-4)

    running, returns = 0, []
    for r in rollouts:
        for reward, reset in zip(r["rewards"], r["dones"]):
            running = reward + GAMMA * running * (1 - reset)
            returns.append(running)
    np.testing.assert_allclose(it.agent.return_moments.var, np.array(returns)[valid].var(), rtol=1e-4)
    assert it.agent.return_moments.count == it.agent.obs_moments.count == valid.sum()
    np.testing.assert_allclose(it.rollout.discounted, running, rtol=1e-4)


@normalising
def test_a_rollout_is_learnt_from_with_the_statistics_it_was_acted_with(module):
    """So the first minibatch finds every ratio at one: its KL divergence is zero, whatever the statistics."""
    it = build(module, "eager", "cpu")
    learn_from(it, 0)
    it.rollout.obs.add_(1)
    obs, used = it.rollout.obs[0], []
    acted = it.agent.normalize(obs)

    def watch(*inputs):
        grads, metrics = module.gradients(*inputs)
        used.append((it.agent.normalize(obs), metrics))
        return grads, metrics

    module.update(it.agent, it.optimizer, it.rollout, it.args, it.metrics, gradients=watch)
    assert all(torch.equal(acted, normalised) for normalised, _ in used)
    kl, clipfrac = used[0][1][[module.METRICS.index("approx_kl"), module.METRICS.index("clipfrac")]]
    assert abs(kl) < 1e-6 and clipfrac == 0
    assert not torch.equal(acted, it.agent.normalize(obs)), "they change once the rollout is done with"


@normalising
def test_observations_are_normalised_and_rewards_only_scaled_within_ten(module):
    agent = module.Agent((2,), 1)
    agent.obs_moments.mean.copy_(torch.tensor([3.0, 0.0]))
    agent.obs_moments.var.copy_(torch.tensor([4.0, 0.0]))
    obs = torch.tensor([[5.0, 0.0], [-1e9, 1e9]])
    torch.testing.assert_close(agent.normalize(obs), torch.tensor([[1.0, 0.0], [-10.0, 10.0]]))
    agent.return_moments.mean.fill_(7.0)
    agent.return_moments.var.fill_(16.0)
    torch.testing.assert_close(agent.scale(torch.tensor([2.0, -4.0, 1e6])), torch.tensor([0.5, -1.0, 10.0]))
    for outputs in (agent.policy, agent.value):
        assert torch.equal(outputs(torch.tensor([[1e9, 0.0]])), outputs(torch.tensor([[1e6, 0.0]])))


@normalising
def test_the_warm_up_puts_back_all_that_learning_changes(module, monkeypatch):
    """Statistics and running returns belong to the state of a captured learning phase, as parameters do."""
    listed = []
    monkeypatch.setattr(module, "warm_up", lambda step, state: listed.append(state()))
    it = build(module, "compile", "cpu")
    state = {id(x) for x in listed[-1]}
    assert {id(x) for x in (*it.agent.parameters(), *it.agent.buffers(), it.rollout.discounted)} <= state


@normalising
def test_scoring_leaves_the_statistics_alone_and_a_checkpoint_has_them(module, cli, tmp_path):
    """The score of a loaded checkpoint is the run's own; with other statistics the same weights score otherwise."""
    agent = module.__name__
    trained = final_json(cli(agent, *tiny(agent, run_dir="run", seed=3)))
    checkpoint = read_checkpoint(tmp_path / "run")
    statistics = {name for name in checkpoint["agent"] if "moments" in name}
    assert len(statistics) == 6 and checkpoint["agent"]["obs_moments.count"] > 0.9 * trained["global_step"]
    assert final_json(cli(agent, "--evaluate", "run"))["eval_returns"] == trained["eval_returns"]
    checkpoint["agent"]["obs_moments.mean"] += 1
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    assert final_json(cli(agent, "--evaluate", "run"))["eval_returns"] != trained["eval_returns"]


@normalising
def test_evaluation_changes_no_tensor(module):
    envs = module.make_envs(module.Args(env_id="Hopper-v4"), 2, seed=1)
    agent = module.Agent(envs.single_observation_space.shape, *envs.single_action_space.shape)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    assert len(module.evaluate(agent, envs, 2, torch.Generator().manual_seed(1))) == 2
    assert all(torch.equal(before[name], x) for name, x in agent.state_dict().items())


class Spy:
    """An environment that remembers the actions it was given, whose float64 bounds no float32 meets."""

    num_envs = 2
    single_observation_space = gymnasium.spaces.Box(-9, 9, (3,), np.float64)
    single_action_space = gymnasium.spaces.Box(np.array([-0.1, -0.4]), np.array([0.1, 0.4]), dtype=np.float64)
    given = []

    def __init__(self, *args, **kwargs):
        self.rng, self.elapsed = np.random.default_rng(0), 0

    def reset(self):
        self.__init__()
        return self.rng.normal(size=(2, 3)), {}

    def step(self, actions):
        self.given.append(actions.copy())
        self.elapsed += 1
        no, cut = np.zeros(2, bool), np.full(2, self.elapsed % 10 == 0)
        return self.rng.normal(size=(2, 3)), np.ones(2, np.float32), no, cut, {}


@normalising
def test_environments_get_clipped_actions_and_the_loss_drawn_ones(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "make_envs", Spy)
    monkeypatch.setattr(Spy, "given", [])
    drawn, real_update = [], module.update

    def update(agent, optimizer, rollout, *rest):
        drawn.append(rollout.actions.clone())
        real_update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(module, "update", update)
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 1, "total_timesteps": 2 * 8 * 4, "eval_episodes": 2}
    module.main(module.Args(**sizes, device="cpu", mode="eager", run_dir=str(tmp_path / "run")))
    drawn, space = torch.cat(drawn).double().numpy(), Spy.single_action_space
    assert (abs(drawn) > space.high).mean() > 0.5, "the first policies draw with a standard deviation of one"
    np.testing.assert_array_equal(Spy.given[: len(drawn)], np.clip(drawn, space.low, space.high))
    assert len(Spy.given) > len(drawn) and all(space.contains(a) for actions in Spy.given for a in actions)


@normalising
def test_what_cannot_be_drawn_is_refused_before_training(module, cli, tmp_path, monkeypatch):
    """MuJoCo ends the process that draws without an OpenGL driver: here, the one that only tries."""
    monkeypatch.setattr("sys.executable", "false")
    result = cli(module.__name__, *tiny(module.__name__, run_dir="run"), "--video")
    assert result.returncode == 2 and len(result.messages) == 1
    assert "--video" in result.messages[0] and not list(tmp_path.iterdir())
