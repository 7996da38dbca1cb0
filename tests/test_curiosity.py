"""Random network distillation: what the intrinsic reward is, whom it teaches what, and that it finds a far reward."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with, read_checkpoint

GAMMA, INT_GAMMA, LAMBDA = 0.97, 0.9, 0.8
curious = pytest.mark.parametrize("module", agents_with("prediction_errors"))
PICTURES, ACTIONS = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8), gymnasium.spaces.Discrete(3)


def pictures(*shape, seed):
    """Random pictures of which each pixel has a mean of its own, as numpy has them."""
    rng = np.random.default_rng(seed)
    return (np.random.default_rng(0).integers(200, size=(84, 84)) + rng.integers(50, size=(*shape, 84, 84))).astype(
        "u1"
    )


# ---- the predictor ---------------------------------------------------------------------------------------------------


@curious
def test_pictures_are_normalised_by_pixel(module):
    """By numpy's mean and standard deviation of all that was observed, within five of these."""
    agent, seen = module.Agent(3), pictures(60, 1, seed=1)
    seen[:, :, 3, 5] = 141  # never changes
    for part in np.split(seen, [7, 30]):
        agent.observe(torch.tensor(part))
    assert agent.obs_moments.count == 60
    new = pictures(9, 1, seed=2)
    new[:4, :, 3, 5], new[4:, :, 3, 5] = 141, 142
    new[0, 0, :2] = 255
    normalised = agent.normalize(torch.tensor(new))
    assert normalised.dtype == torch.float32 and normalised.shape == (9, 1, 84, 84)
    floats = seen.astype(float)
    expected = np.clip((new - floats.mean(0)) / np.sqrt(floats.var(0) + 1e-4), -5, 5)
    np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=5e-3)
    assert (normalised[:4, 0, 3, 5].abs() < 0.01).all() and (normalised[4:, 0, 3, 5] == 5).all()
    assert normalised.abs().max() == 5


@curious
def test_the_error_is_that_of_the_features(module):
    """It is zero where the predictor is the target, and its gradient trains the predictor alone."""
    torch.manual_seed(0)
    agent, shown = module.Agent(3), torch.tensor(pictures(5, 1, seed=1))
    agent.observe(shown)
    errors = module.prediction_errors(agent, shown)
    features = (net(agent.normalize(shown)).detach().double().numpy() for net in (agent.target, agent.predictor))
    first, second = features
    assert first.shape == (5, 512)
    np.testing.assert_allclose(errors.detach(), ((first - second) ** 2).mean(-1), rtol=1e-4)
    errors.sum().backward()
    trained = {name for name, param in agent.named_parameters() if param.grad is not None and param.grad.any()}
    assert trained == {name for name, _ in agent.named_parameters() if name.startswith("predictor")}
    agent.predictor = agent.target
    assert not module.prediction_errors(agent, shown).any()


@curious
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_error_wanes_where_it_was_trained(module, bf16):
    """And is larger where the pictures are others."""
    torch.manual_seed(0)
    agent = module.Agent(3, bf16)
    known, other = torch.tensor(pictures(4, 1, seed=1)), torch.tensor(255 - pictures(4, 1, seed=2))
    agent.observe(known)
    adam = torch.optim.Adam(agent.predictor.parameters(), 1e-3)
    before = module.prediction_errors(agent, known).mean().item()
    for _ in range(25):
        adam.zero_grad()
        module.prediction_errors(agent, known).mean().backward()
        adam.step()
    after = [module.prediction_errors(agent, some).mean().item() for some in (known, other)]
    assert after[0] < 0.1 * before and after[1] > 3 * after[0], (before, after)


# ---- the loss --------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """Logits and both values read from tables; a picture is its own error."""

    def __init__(self, rows, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        tables = (torch.nn.Parameter(torch.randn(rows, *shape, generator=generator)) for shape in ((3,), (2,), ()))
        self.logits, self.values, self.errors = tables

    def forward(self, obs):
        return self.logits[obs], self.values[obs]


@pytest.fixture
def errors_of_tables(monkeypatch):
    for case in agents_with("prediction_errors"):
        monkeypatch.setattr(
            case.values[0], "prediction_errors", lambda agent, pictures: agent.errors[pictures].square()
        )


def minibatch(rows, seed):
    """What ppo_rnd_loss takes, by name; about one row in five is a reset row."""
    rng = np.random.default_rng(seed)
    data = {"obs": np.arange(rows), "actions": rng.integers(3, size=rows), "logprobs": -rng.exponential(size=rows)}
    data |= {"values": rng.normal(size=(rows, 2)), "advantages": rng.normal(size=(rows, 2))}
    data |= {"valid": (rng.random(rows) < 0.8).astype(float), "pictures": rng.permutation(rows)}
    return {name: torch.tensor(x, dtype=torch.float32 if x.dtype == float else None) for name, x in data.items()}


@curious
@pytest.mark.parametrize("norm_adv, clip_vloss", [(True, True), (False, False)])
def test_the_loss_is_numpys(module, norm_adv, clip_vloss, errors_of_tables):
    rows, clip, data, agent = 50, 0.2, minibatch(50, seed=1), Table(50, seed=2)
    coefficients = {"ext_coef": 1.7, "int_coef": 0.6, "ent_coef": 0.03, "vf_coef": 0.7, "update_proportion": 0.3}
    args = module.Args(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=clip, **coefficients)
    new_logprobs, entropies, _ = module.evaluate_actions(agent, data["obs"], data["actions"])
    data["logprobs"] = new_logprobs.detach() + torch.randn(rows, generator=torch.Generator().manual_seed(3)) / 3
    loss, metrics = module.ppo_rnd_loss(agent, args, **data)

    numpy = {name: x.double().numpy() for name, x in data.items()}
    keep, values, new_values = numpy["valid"] == 1, numpy["values"], agent.values.detach().double().numpy()
    ratio = np.exp(new_logprobs.detach().numpy() - numpy["logprobs"])[keep]
    returns, advantages = numpy["advantages"] + values, (numpy["advantages"] @ [1.7, 0.6])[keep]
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss = -np.minimum(advantages * ratio, advantages * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    v_error, int_v_error = ((new_values - returns) ** 2).T
    if clip_vloss:
        moved = values[:, 0] + np.clip((new_values - values)[:, 0], -clip, clip)
        v_error = np.maximum(v_error, (moved - returns[:, 0]) ** 2)
    expected = {"policy_loss": pg_loss, "value_loss": 0.5 * v_error[keep].mean()}
    expected |= {"int_value_loss": 0.5 * int_v_error.mean(), "entropy": entropies.detach().numpy()[keep].mean()}
    expected["predictor_loss"] = (agent.errors.detach().numpy()[data["pictures"][:15]] ** 2).mean()
    expected |= {"approx_kl": (ratio - 1 - np.log(ratio)).mean(), "clipfrac": (abs(ratio - 1) > clip).mean()}
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)
    total = pg_loss + 0.7 * (expected["value_loss"] + expected["int_value_loss"]) - 0.03 * expected["entropy"]
    assert loss.item() == pytest.approx(total + expected["predictor_loss"], rel=1e-4)


@curious
def test_reset_rows_teach_the_intrinsic_value_and_the_predictor_alone(module, errors_of_tables):
    data, gradients = minibatch(40, seed=2), []
    reset = data["valid"] == 0
    for spoil in (0.0, 5.0):
        data["logprobs"][reset] += spoil
        data["values"][reset, 0] += spoil
        data["advantages"][reset] += spoil
        agent = Table(40, seed=1)
        module.ppo_rnd_loss(agent, module.Args(update_proportion=1), **data)[0].backward()
        gradients.append([agent.logits.grad, agent.values.grad[:, 0], agent.values.grad[:, 1], agent.errors.grad])
    for (clean, spoilt), intrinsic in zip(zip(*gradients), (False, False, True, True)):
        assert torch.equal(clean[~reset], spoilt[~reset]) and (clean[~reset] != 0).any()
        assert (clean[reset] != 0).all() if intrinsic else (spoilt[reset] == 0).all()


@curious
def test_a_minibatch_of_reset_rows_alone_is_finite(module, errors_of_tables):
    agent, data = Table(6, seed=1), minibatch(6, seed=3)
    loss, _ = module.ppo_rnd_loss(agent, module.Args(), **data | {"valid": torch.zeros(6)})
    loss.backward()
    assert loss.isfinite() and not agent.logits.grad.any() and not agent.values.grad[:, 0].any()


@curious
@pytest.mark.parametrize("proportion, rows, some", [(0.25, 16, 4), (0.25, 2, 1), (1.0, 7, 7), (0.0, 5, 1)])
def test_the_predictor_learns_from_its_part_of_a_minibatch(module, proportion, rows, some, errors_of_tables):
    agent, data = Table(rows, seed=1), minibatch(rows, seed=4)
    module.ppo_rnd_loss(agent, module.Args(update_proportion=proportion), **data)[0].backward()
    assert set(agent.errors.grad.nonzero().flatten().tolist()) == set(data["pictures"][:some].tolist())


# ---- the learning phase ----------------------------------------------------------------------------------------------


def build(module, T=6, N=4):
    """An agent that has seen some pictures, and its learning phase, in eager mode."""
    args = module.Args(num_envs=N, num_steps=T, num_minibatches=3, update_epochs=2, gamma=GAMMA, int_gamma=INT_GAMMA)
    args.gae_lambda = LAMBDA
    envs, device = SimpleNamespace(single_observation_space=PICTURES, single_action_space=ACTIONS), torch.device("cpu")
    torch.manual_seed(0)
    agent, rollout = module.Agent(3), module.Rollout(args, envs, device)
    agent.observe(torch.tensor(pictures(40, 1, seed=99)))
    optimizer = torch.optim.Adam(agent.parameters(), torch.tensor(1e-4), eps=1e-5, fused=True)
    return SimpleNamespace(**locals())


def fill(rollout, seed):
    """A rollout of random data in which every end is followed by a reset row."""
    rng, (_, rows, N) = np.random.default_rng(seed), rollout.host_outcomes.shape
    rewards, terminations, dones = np.zeros((3, rows, N))
    dones[0] = rollout.host_outcomes[2, -1]
    for t in range(1, rows):
        going_on = dones[t - 1] == 0
        rewards[t] = rng.normal(size=N) * going_on
        dones[t] = (rng.random(N) < 0.4) * going_on
        terminations[t] = dones[t] * (rng.random(N) < 0.5)
    rollout.host_outcomes.copy_(torch.tensor(np.stack([rewards, terminations, dones])))
    rollout.obs.copy_(torch.tensor(pictures(*rollout.obs.shape[:3], seed=seed)))
    rollout.host_obs.copy_(rollout.obs[-1])
    rollout.obs[-1] = 0  # for update to fill, as are these
    rollout.values.copy_(torch.tensor(rng.normal(size=rollout.values.shape)))
    rollout.values[-1] = 0
    rollout.actions.copy_(torch.tensor(rng.integers(3, size=rollout.actions.shape)))
    return rewards, terminations, dones


def loop_of_gae(rewards, values, terminations, dones, gamma):
    """Advantages [T, N], one environment and one step after the other."""
    advantages = np.zeros((len(rewards) - 1, rewards.shape[1]))
    for n in range(rewards.shape[1]):
        following = 0
        for t in reversed(range(len(advantages))):
            beyond = 0 if terminations[t + 1, n] else values[t + 1, n]
            following = 0 if dones[t + 1, n] else following
            advantages[t, n] = rewards[t + 1, n] + gamma * beyond - values[t, n] + gamma * LAMBDA * following
            following = advantages[t, n]
    return advantages


@curious
def test_the_learning_phase_hands_every_row_with_its_targets_to_the_loss(module):
    """Over three rollouts: the filter runs over time in each environment, and neither it nor the intrinsic return ends.

    Rewards and statistics are those from before the learning, which sees each picture that an action led to.
    """
    it = build(module)
    T, N, sums, running, seen = it.T, it.N, [], np.zeros(it.N), [pictures(40, seed=99)]
    for number in range(3):
        rewards, terminations, dones = fill(it.rollout, number)
        module.draw_noise(it.rollout, torch.Generator().manual_seed(number))
        newest = torch.cat([it.rollout.obs[1:-1, :, 3], it.rollout.host_obs[None, :, 3]])
        with torch.no_grad():
            errors = module.prediction_errors(it.agent, newest.flatten(0, 1)[:, None]).view(T, N).double().numpy()
            last_values = it.agent(it.rollout.host_obs)[1]
        statistics = {name: x.clone() for name, x in it.agent.obs_moments.state_dict().items()}
        batches = []

        def record(loss_fn, params, agent, args, *inputs):
            batches.append(inputs)  # noqa: B023
            assert all(torch.equal(statistics[k], x) for k, x in agent.obs_moments.state_dict().items())  # noqa: B023
            return module.gradients(loss_fn, params, agent, args, *inputs)

        metrics = module.update(it.agent, it.optimizer, it.rollout, it.args, record)
        for row in errors:
            running = running * INT_GAMMA + row
            sums.append(running)
        np.testing.assert_allclose(it.agent.return_moments.var, np.var(sums), rtol=1e-3)
        np.testing.assert_allclose(it.rollout.discounted, running, rtol=1e-4)
        int_rewards = np.concatenate([np.zeros((1, N)), errors]) / np.std(sums)
        assert metrics["int_reward"].item() == pytest.approx(int_rewards[1:].mean(), rel=1e-3)
        assert torch.equal(it.rollout.values[-1], last_values)
        seen.append(newest.flatten(0, 1).numpy())
        everything = np.concatenate(seen).reshape(-1, 84 * 84).astype(float)
        np.testing.assert_allclose(it.agent.obs_moments.mean, everything.mean(0), rtol=1e-4)
        np.testing.assert_allclose(it.agent.obs_moments.var, everything.var(0), rtol=1e-3, atol=1e-3)
        assert it.agent.obs_moments.count == len(everything)

        values = it.rollout.values.double().numpy()
        targets = [loop_of_gae(rewards, values[..., 0], terminations, dones, GAMMA)]
        targets.append(loop_of_gae(int_rewards, values[..., 1], 0 * dones, 0 * dones, INT_GAMMA))
        flat = [x.flatten(0, 1) for x in (it.rollout.obs[:-1], it.rollout.actions, it.rollout.values[:-1])]
        assert len(batches) == 6
        for rows, batch in zip(it.rollout.permutations.view(6, -1), batches):
            obs, actions, _, old_values, advantages, valid, shown = batch
            assert torch.equal(obs, flat[0][rows]) and torch.equal(actions, flat[1][rows])
            assert torch.equal(old_values, flat[2][rows]) and torch.equal(shown, newest.flatten(0, 1)[rows][:, None])
            np.testing.assert_array_equal(valid, 1 - dones[:-1].flatten()[rows])
            expected = np.stack([target.flatten()[rows] for target in targets], -1)
            np.testing.assert_allclose(advantages, expected, rtol=1e-3, atol=1e-4)


@curious
def test_the_fixed_network_stays_and_all_others_learn(module):
    it = build(module)
    before = {name: x.clone() for name, x in it.agent.state_dict().items()}
    fill(it.rollout, 0)
    module.draw_noise(it.rollout, torch.Generator().manual_seed(0))
    module.update(it.agent, it.optimizer, it.rollout, it.args)
    still = {name for name, x in it.agent.state_dict().items() if torch.equal(x, before[name])}
    assert still == {name for name in before if name.startswith("target.")}


# ---- a task that needs curiosity -------------------------------------------------------------------------------------


class Corridor:
    """Forty steps to a reward at the end, and there alone. At each place one of two actions leads on, the other back.

    A picture shows the place as a bright square. Episodes end with the reward, or are cut off after 80 steps.
    """

    length, limit, metadata = 40, 80, {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = PICTURES, gymnasium.spaces.Discrete(2)

    def __init__(self, num_envs):
        self.onward, self.num_envs = np.random.default_rng(0).integers(2, size=self.length + 1), num_envs
        self.places, self.elapsed = np.zeros((2, num_envs), int)
        self.ended = np.ones(num_envs, bool)
        self.obs, self.played = np.zeros((num_envs, 4, 84, 84), np.uint8), []

    def reset(self):
        self.ended[:] = True
        return self.step(np.zeros(self.num_envs))[0], {}

    def step(self, actions):
        self.played.append(np.array(actions))
        moves = np.where(actions == self.onward[self.places], 1, -1)
        self.places = np.where(self.ended, 0, (self.places + moves).clip(0))
        self.elapsed = np.where(self.ended, 0, self.elapsed + 1)
        terminations = self.places == self.length
        truncations = (self.elapsed == self.limit) & ~terminations
        self.ended = terminations | truncations
        self.obs[:, :-1] = self.obs[:, 1:]
        self.obs[:, -1] = 0
        for n, (row, column) in enumerate(zip(12 * (self.places // 7), 12 * (self.places % 7))):
            self.obs[n, -1, row : row + 12, column : column + 12] = 255
        rewards = terminations.astype(np.float32)
        infos = {"reward": rewards, "terminated": terminations, "lives": np.zeros(self.num_envs)}
        return self.obs.copy(), rewards, terminations, truncations, infos


class Squares(torch.nn.Module):
    """The pixels in the middle of every square of pictures [batch, channels, 84, 84], in a row."""

    def forward(self, pictures):
        return pictures[..., 6::12, 6::12].flatten(1)


def walk(agent, convolutional, monkeypatch, tmp_path, **changes):
    """Train an agent in the corridor as its `main` does; returns its summary and the environments, in order."""
    module, made = agent_named(agent), []

    class Sparse(module.Agent):
        """The agent, but for layers over one pixel of each square in place of its convolutions: far cheaper."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)

            def network(first, channels, layers):
                net = [first, module.layer_init(torch.nn.Linear(49 * channels, 512))]
                for _ in range(layers - 1):
                    net += [torch.nn.ReLU(), module.layer_init(torch.nn.Linear(512, 512))]
                return torch.nn.Sequential(*net)

            self.network = torch.nn.Sequential(network(torch.nn.Flatten(), 4, 1), torch.nn.ReLU())
            if hasattr(self, "target"):
                self.target, self.predictor = (network(Squares(), 1, layers) for layers in (2, 3))
                self.target.requires_grad_(False)

        def forward(self, obs):
            return super().forward(obs[..., 6::12, 6::12])

    def make_envs(args, num_envs, seed):
        made.append(Corridor(num_envs))
        return made[-1]

    monkeypatch.setattr(module, "make_envs", make_envs)
    if not convolutional:
        monkeypatch.setattr(module, "Agent", Sparse)
    sizes = {"num_envs": 16, "num_steps": 32, "num_minibatches": 2, "eval_episodes": 20, "gamma": 0.99}
    sizes |= {"learning_rate": 1e-3, "anneal_lr": False}
    sizes |= {"num_iterations_obs_norm_init": 2} if hasattr(module, "prediction_errors") else {}
    machine = {"device": "cpu", "precision": "fp32", "torch_threads": 1, "run_dir": str(tmp_path / agent)}
    return module.main(module.Args(**sizes | machine | {"total_timesteps": 60 * 32 * 16} | changes)), made


@pytest.mark.slow
@pytest.mark.parametrize("convolutional", [False, True])
def test_finds_a_reward_that_is_far_away(convolutional, monkeypatch, tmp_path):
    """The agent that is curious always gets there in the end, and the one that is not never does."""
    changes = {"learning_rate": 5e-4, "total_timesteps": 100 * 32 * 16} if convolutional else {}
    found, _ = walk("ppo_rnd_atari", convolutional, monkeypatch, tmp_path, **changes)
    plain, _ = walk("ppo_atari", convolutional, monkeypatch, tmp_path, **changes)
    assert found["eval_return_mean"] > 0.8 and found["global_step"] == plain["global_step"]
    assert plain["eval_return_mean"] == plain["train_return_mean"] == 0


@curious
def test_random_actions_come_first_and_a_resumed_run_has_their_statistics(module, monkeypatch, tmp_path):
    """They count as no steps; the environments start anew after them."""
    sizes = {"num_envs": 4, "num_steps": 8, "eval_episodes": 0, "num_iterations_obs_norm_init": 3}
    summary, (envs,) = walk(module.__name__, False, monkeypatch, tmp_path, **sizes, total_timesteps=2 * 8 * 4)
    played = np.array(envs.played)
    assert summary["global_step"] == 2 * 8 * 4 and len(played) == 1 + 3 * 8 + 1 + 2 * 8
    assert not played[[0, 25]].any() and 0.3 < played[1:25].mean() < 0.7
    moments = read_checkpoint(tmp_path / module.__name__)["agent"]
    assert moments["obs_moments.count"] == 4 * (3 * 8 + 2 * 8)
    again = module.parse_args(["--resume", str(tmp_path / module.__name__), "--total-timesteps", str(3 * 8 * 4)])
    made = module.make_envs
    monkeypatch.setattr(module, "make_envs", lambda *inputs: resumed.append(made(*inputs)) or resumed[-1])
    resumed = []
    module.main(again)
    assert len(resumed[0].played) == 1 + 8
    moments = read_checkpoint(tmp_path / module.__name__)["agent"]
    assert moments["obs_moments.count"] == 4 * (3 * 8 + 3 * 8)


@curious
def test_a_run_stopped_among_its_random_actions_begins_with_them_again(module, monkeypatch, tmp_path):
    """It has not judged a picture yet, and what it saved is from before the first one."""
    signals, make = [], module.make_envs

    def make_watched(args, num_envs, seed):
        envs = make(args, num_envs, seed)
        step = envs.step

        def watched(actions):
            played.append(actions)
            if len(played) == 5:
                signals.append(15)
            return step(actions)

        envs.step = watched
        return envs

    played, sizes = [], {"num_envs": 2, "num_steps": 8, "num_iterations_obs_norm_init": 2, "env_id": "Pong-v5"}
    monkeypatch.setattr(module, "make_envs", make_watched)
    machine = {"device": "cpu", "eval_episodes": 0, "total_timesteps": 2 * 2 * 8, "run_dir": str(tmp_path / "run")}
    summary = module.main(module.Args(**sizes | machine), signals)
    assert len(played) == 5 and summary["global_step"] == 0 and summary["stopped_by"] == "SIGTERM"
    assert read_checkpoint(tmp_path / "run")["agent"]["obs_moments.count"] == 0
    signals = []
    module.main(module.parse_args(["--resume", str(tmp_path / "run")]))
    assert read_checkpoint(tmp_path / "run")["agent"]["obs_moments.count"] == 2 * (2 * 8 + 2 * 8)
