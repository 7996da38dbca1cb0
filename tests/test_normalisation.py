"""Running statistics of observations and rewards: numpy's, over all rows that count, frozen when a run is scored."""

import json
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with, read_checkpoint, tiny_args

GAMMA = 0.9
keeping = pytest.mark.parametrize("module", agents_with("Moments"))
normalising = pytest.mark.parametrize("module", agents_with("Moments", "FlatObservations"))  # vectors


def build(module):
    """An agent and the learning phase of four environments, in eager mode."""
    args = module.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2, gamma=GAMMA)
    obs_space, actions = (gymnasium.spaces.Box(-1, 1, (n,), np.float32) for n in (6, 3))
    envs = SimpleNamespace(single_observation_space=obs_space, single_action_space=actions)
    torch.manual_seed(0)
    agent, rollout = module.Agent((6,), [-1] * 3, [1] * 3), module.Rollout(args, envs, torch.device("cpu"))
    optimizer = torch.optim.Adam(agent.parameters(), torch.tensor(0.01), eps=1e-5, fused=True)
    _, learn = module.accelerate("eager", agent, optimizer, rollout, args)
    return SimpleNamespace(**locals())


def random_outcomes(T, N, seed, last_dones=None):
    """Rewards, terminations and dones [T + 1, N] as next-step autoreset produces them: every end, then a reset row."""
    rng = np.random.default_rng(seed)
    rewards, dones = rng.normal(size=(T + 1, N)), rng.random((T + 1, N)) < 0.2
    dones[0] = False if last_dones is None else last_dones
    for t in range(T):
        dones[t + 1] &= ~dones[t]
        rewards[t + 1, dones[t]] = 0
    return rewards, dones * (rng.random(dones.shape) < 0.5), dones.astype(float)


def loop_of_returns(rewards, dones, running):
    """Discounted returns so far, [T, N], step by step."""
    returns = []
    for reward, reset in zip(rewards[1:], dones[:-1]):
        running = reward + GAMMA * running * (1 - reset)
        returns.append(running)
    return np.array(returns)


@keeping
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


@keeping
def test_discounted_returns_are_the_loop_and_go_on_over_rollouts(module):
    rewards, _, dones = map(torch.tensor, random_outcomes(40, 5, seed=2, last_dones=np.arange(5) % 2 == 0))
    before = torch.randn(5, dtype=torch.float64)
    whole = module.discounted_returns(rewards, dones, before, GAMMA)
    expected = loop_of_returns(rewards.numpy(), dones.numpy(), before.numpy())
    np.testing.assert_allclose(whole, expected, rtol=1e-9, atol=1e-12)
    for cut in (1, 17, 39):
        first = module.discounted_returns(rewards[: cut + 1], dones[: cut + 1], before, GAMMA)
        second = module.discounted_returns(rewards[cut:], dones[cut:], first[-1], GAMMA)
        torch.testing.assert_close(torch.cat([first, second]), whole)


def learn_from(it, number):
    """A rollout of random data through the learning phase; returns its observations, rewards and dones."""
    rollout, generator = it.rollout, torch.Generator().manual_seed(number)
    T, N = rollout.actions.shape[:2]
    rewards, terminations, dones = random_outcomes(T, N, number, rollout.host_outcomes[2, -1].numpy() == 1)
    obs = np.random.default_rng(number).normal(3, 2, size=rollout.obs.shape)
    rollout.obs.copy_(torch.tensor(obs))
    rollout.host_obs.copy_(rollout.obs[-1])
    rollout.actions.normal_(generator=generator)
    rollout.host_outcomes.copy_(torch.tensor(np.stack([rewards, terminations, dones])))
    it.module.draw_noise(rollout, generator)
    it.learn()
    return obs, rewards, dones


@normalising
def test_the_learning_phase_takes_in_each_row_that_counts_once(module):
    """Three rollouts, whose statistics are those of all rows but the reset rows; returns go on from one to the next."""
    it = build(module)
    rollouts, returns = [learn_from(it, number) for number in range(3)], [np.zeros((1, 4))]
    valid = np.concatenate([dones[:-1] for _, _, dones in rollouts]) == 0
    obs = np.concatenate([obs[:-1] for obs, _, _ in rollouts])[valid]
    np.testing.assert_allclose(it.agent.obs_moments.mean, obs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(it.agent.obs_moments.var, obs.var(0), rtol=1e-4)
    for _, rewards, dones in rollouts:
        returns.append(loop_of_returns(rewards, dones, returns[-1][-1]))
    np.testing.assert_allclose(it.agent.return_moments.var, np.concatenate(returns[1:])[valid].var(), rtol=1e-4)
    assert it.agent.return_moments.count == it.agent.obs_moments.count == valid.sum()
    np.testing.assert_allclose(it.rollout.discounted, returns[-1][-1], rtol=1e-4)


@normalising
@pytest.mark.parametrize("what", ["obs", "rewards"])
def test_what_is_not_finite_any_more_is_seen_in_the_same_iteration(module, what):
    """Normalised and clipped, an infinite number does not show in the loss, but it stays in the statistics."""
    it = build(module)
    learn_from(it, 0)
    (it.rollout.obs if what == "obs" else it.rollout.host_outcomes[0])[2, 1] = torch.inf
    metrics = it.learn()
    assert not metrics["obs_var" if what == "obs" else "return_var"].isfinite()
    assert metrics["return_var" if what == "obs" else "obs_var"].isfinite()


@normalising
def test_a_rollout_is_learnt_from_with_the_statistics_it_was_acted_with(module):
    """So the first minibatch finds every ratio at one: its KL divergence is zero, whatever the statistics."""
    it = build(module)
    it.args.rpo_alpha = 0.0  # where there is one, it moves the ratios
    learn_from(it, 0)
    it.rollout.obs.add_(1)
    obs, used = it.rollout.obs[0], []
    acted = it.agent.normalize(obs)

    def watch(*inputs):
        grads, metrics = module.gradients(*inputs)
        used.append((it.agent.normalize(obs), dict(metrics)))
        return grads, metrics

    module.update(it.agent, it.optimizer, it.rollout, it.args, gradients=watch)
    assert all(torch.equal(acted, normalised) for normalised, _ in used)
    first, last = used[0][1], used[-1][1]
    assert abs(first["approx_kl"]) < 1e-6 and first["clipfrac"] == 0 and last["approx_kl"] > 1e-5
    assert not torch.equal(acted, it.agent.normalize(obs)), "they change once the rollout is done with"


def test_rpo_moves_the_mean_of_every_action_it_learns_from():
    """Anew in each epoch, by up to rpo_alpha: the density at an action moved back is that of a mean moved on."""
    module = agent_named("rpo_continuous_action")
    it = build(module)
    learn_from(it, 0)
    it.args.rpo_alpha, seen = 0.5, []

    def watch(*inputs):
        seen.append(inputs[5])
        return module.gradients(*inputs)

    module.draw_noise(it.rollout, torch.Generator().manual_seed(3))
    module.update(it.agent, it.optimizer, it.rollout, it.args, gradients=watch)
    shifts, actions = it.rollout.shifts, it.rollout.actions.flatten(0, 1)
    assert shifts.abs().max() <= 1 and len(set(shifts.flatten().tolist())) > 0.9 * shifts.numel()
    each = zip(it.rollout.permutations, shifts)
    wanted = torch.cat([(actions - 0.5 * moves)[rows] for rows, moves in each])
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0, atol=0)


@normalising
def test_observations_are_normalised_and_rewards_only_scaled_within_ten(module):
    agent = module.Agent((2,), [-1], [1])
    agent.obs_moments.mean.copy_(torch.tensor([3.0, 0.0]))
    agent.obs_moments.var.copy_(torch.tensor([4.0, 0.0]))
    obs = torch.tensor([[5.0, 0.0], [-1e9, 1e9]])
    torch.testing.assert_close(agent.normalize(obs), torch.tensor([[1.0, 0.0], [-10.0, 10.0]]))
    agent.return_moments.mean.fill_(7.0)
    agent.return_moments.var.fill_(16.0)
    torch.testing.assert_close(agent.scale(torch.tensor([2.0, -4.0, 1e6])), torch.tensor([0.5, -1.0, 10.0]))
    for far, near in zip(agent(torch.tensor([[1e9, 0.0]])), agent(torch.tensor([[1e6, 0.0]]))):
        assert torch.equal(far, near), "the network sees clipped observations"


@normalising
def test_scoring_leaves_the_statistics_alone_and_a_checkpoint_has_them(module, tmp_path):
    """The score of a loaded checkpoint is the run's own; with other statistics the same weights score otherwise."""
    run, args = tmp_path / "run", tiny_args(module, tmp_path, seed=3)
    trained = module.main(args)
    checkpoint = read_checkpoint(run)
    statistics = {name for name in checkpoint["agent"] if "moments" in name}
    assert len(statistics) == 6 and checkpoint["agent"]["obs_moments.count"] > 0.9 * trained["global_step"]

    def score(*flags):
        return module.main(module.parse_args(["--evaluate", str(run), *flags]))

    assert score()["eval_returns"] == trained["eval_returns"]
    greedy = score("--eval-greedy")  # both scores, whichever is asked for
    kinds = "eval_sampled_return_mean", "eval_greedy_return_mean"
    assert greedy[kinds[0]] != greedy[kinds[1]] and all(greedy[kind] == trained[kind] for kind in kinds)
    assert (trained["eval_return_mean"], greedy["eval_return_mean"]) == tuple(trained[kind] for kind in kinds)
    checkpoint["agent"]["obs_moments.mean"] += 1
    torch.save(checkpoint, run / "checkpoint.pt")
    assert score()["eval_returns"] != trained["eval_returns"]

    # what a user deploys: the network from the run folder, which gives actions that the environment takes
    agent = module.Agent(**json.loads((run / "config.json").read_text())["network"])
    agent.load_state_dict(checkpoint["agent"])
    space = module.make_envs(args, 1, seed=1).single_action_space
    drawn, actions = agent.policy(torch.randn(50, *agent.obs_moments.mean.shape), 3 * torch.randn(50, *space.shape))
    assert (drawn.abs() > 1).any()
    np.testing.assert_array_equal(actions.detach(), np.clip(drawn.detach().numpy(), space.low, space.high))


@normalising
def test_evaluation_changes_no_tensor(module):
    envs = module.make_envs(module.Args(env_id="Hopper-v4"), 2, seed=1)
    agent = module.Agent(envs.single_observation_space.shape, [-1] * 3, [1] * 3)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    for greedy in (False, True):
        assert len(module.evaluate(agent, envs, torch.Generator().manual_seed(1), greedy)) == 2
    assert all(torch.equal(before[name], x) for name, x in agent.state_dict().items())


class Spy:
    """An environment that remembers the actions it was given, whose float64 bounds no float32 meets."""

    num_envs, metadata = 2, {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gymnasium.spaces.Box(-9, 9, (3,), np.float64)
    single_action_space = gymnasium.spaces.Box(np.array([-0.1, -0.4]), np.array([0.1, 0.4]), dtype=np.float64)
    given = []

    def __init__(self, *args, **kwargs):
        self.rng, self.elapsed = np.random.default_rng(0), 0

    def reset(self):
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
        return real_update(agent, optimizer, rollout, *rest)

    monkeypatch.setattr(module, "update", update)
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 1, "total_timesteps": 2 * 8 * 4, "eval_episodes": 2}
    module.main(module.Args(**sizes, device="cpu", mode="eager", run_dir=str(tmp_path / "run")))
    drawn, space = torch.cat(drawn).double().numpy(), Spy.single_action_space
    assert (abs(drawn) > 2 * space.high).mean() > 0.5, "the first policies draw with a standard deviation of one"
    np.testing.assert_array_equal(Spy.given[: len(drawn)], np.clip(drawn, space.low, space.high))
    assert len(Spy.given) > len(drawn) and all(space.contains(a) for actions in Spy.given for a in actions)


@normalising
def test_an_action_that_is_no_number_does_not_reach_the_environment(module):
    agent = module.Agent((2,), [-1, -2], [1, 2])
    drawn, actions = agent.policy(torch.zeros(1, 2), torch.tensor([[torch.nan, torch.inf]]))
    assert drawn.isnan().any() and actions.tolist() == [[-1, 2]]


@normalising
@pytest.mark.parametrize("bounds, dtype", [(np.inf, np.float32), (5, np.int64)])
def test_refuses_actions_without_bounds_and_whole_numbers(module, bounds, dtype):
    envs = Spy()
    envs.single_action_space = gymnasium.spaces.Box(-bounds, bounds, (2,), dtype)
    module.check_envs(module.Args(), Spy())
    with pytest.raises(module.UserError, match="--env-id HalfCheetah-v4: this agent needs"):
        module.check_envs(module.Args(), envs)


@normalising
def test_what_cannot_be_drawn_is_refused_before_training(module, tmp_path, monkeypatch):
    """MuJoCo ends the process that draws without an OpenGL driver: here, the one that only tries."""
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(module.UserError, match="--video"):
        module.main(tiny_args(module, tmp_path, video=True))
    assert not list(tmp_path.iterdir())
