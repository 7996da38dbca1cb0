"""Targets, losses and sampling against a few lines of numpy."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import agents_with, continuous

GAMMA, LAMBDA = 0.97, 0.9


def by_actions(*names, real):
    """The agents that have these names and choose among actions, or those whose actions are real numbers."""
    return [agent for agent in agents_with(*names) if continuous(agent.id) == real]


def rollout_with_resets(T, N, seed):
    """Rewards, values, terminations and dones as next-step autoreset produces them: every end, then a reset row."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminations, dones = np.zeros((T, N)), np.zeros((T + 1, N))
    for n in range(N):
        for t in range(T):
            if dones[t, n]:  # the reset row: no reward, no end
                rewards[t, n] = 0
            elif rng.random() < 0.2:
                dones[t + 1, n] = 1
                terminations[t, n] = rng.random() < 0.5
    return rewards, values, terminations, dones


def numpy_gae(rewards, values, terminations, dones):
    advantages = np.zeros_like(rewards)
    following = 0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * values[t + 1] * (1 - terminations[t]) - values[t]
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
    rewards, values = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    terminations, dones = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    advantages = module.gae(rewards, values, terminations, dones, 0.5, LAMBDA)
    assert advantages.tolist() == [[1.0, 6.0]]  # ended for good; cut off, so 1 + 0.5 * 10


@pytest.mark.parametrize("module", agents_with("gae"))
def test_gae_ends_with_its_episode(module):
    """What follows an end, reset row included, changes no advantage before it."""
    rewards, values, terminations, dones = map(torch.tensor, rollout_with_resets(40, 3, seed=1))
    before = module.gae(rewards, values, terminations, dones, GAMMA, LAMBDA)
    t, n = map(int, torch.nonzero(dones[1:30])[0])
    rewards[t + 1 :, n] += 100
    values[t + 2 :, n] -= 100
    after = module.gae(rewards, values, terminations, dones, GAMMA, LAMBDA)
    assert torch.equal(before[: t + 1, n], after[: t + 1, n])
    assert not torch.allclose(before[t + 1 :, n], after[t + 1 :, n])


def numpy_q_lambda(rewards, values, terminations, dones):
    targets, following = np.zeros_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        beyond = (1 - LAMBDA) * values[t + 1] + LAMBDA * following
        beyond = np.where(dones[t + 1], values[t + 1], beyond)
        following = targets[t] = rewards[t] + GAMMA * np.where(terminations[t], 0, beyond)
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
    rewards, values = torch.ones(2, 3), torch.tensor([[5.0] * 3, [10.0] * 3, [20.0] * 3])
    terminations, dones = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([[0.0] * 3, [1, 1, 0], [0] * 3])
    targets = module.q_lambda(rewards, values, terminations, dones, 0.5, 0.25)
    # ended for good; cut off: 1 + 0.5 * 10; going on: 1 + 0.5 * (0.75 * 10 + 0.25 * the last row's 1 + 0.5 * 20)
    assert targets[0].tolist() == [1.0, 6.0, 6.125] and targets[1, 2] == 11


@pytest.mark.parametrize("module", agents_with("q_lambda"))
def test_q_lambda_ends_with_its_episode(module):
    """What follows an end, reset row included, changes no target before it."""
    rewards, values, terminations, dones = map(torch.tensor, rollout_with_resets(40, 3, seed=1))
    before = module.q_lambda(rewards, values, terminations, dones, GAMMA, LAMBDA)
    t, n = map(int, torch.nonzero(dones[1:30])[0])
    rewards[t + 1 :, n] += 100
    values[t + 2 :, n] -= 100
    after = module.q_lambda(rewards, values, terminations, dones, GAMMA, LAMBDA)
    assert torch.equal(before[: t + 1, n], after[: t + 1, n])
    assert not torch.allclose(before[t + 1 :, n], after[t + 1 :, n])


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


@pytest.mark.parametrize("module", by_actions("sample_actions", real=False))
def test_actions_are_drawn_with_the_policys_frequencies(module):
    logits, draws = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), 200_000
    agent, obs = Table(logits, torch.zeros(1)), torch.zeros(draws, dtype=torch.int64)
    gumbel = torch.empty(draws, 4).exponential_(generator=torch.Generator().manual_seed(1)).log_().neg_()
    actions = module.sample_actions(agent, obs, gumbel)
    assert actions.dtype == torch.int64
    frequencies = torch.bincount(actions, minlength=4) / draws
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), rtol=0, atol=0.005)


@pytest.mark.parametrize("module", by_actions("ppo_loss", real=True))
def test_real_actions_are_gaussian_and_clipped_for_the_environment(module):
    agent, nan = Table(torch.tensor([[0.5, -2.0]]), torch.zeros(1)).requires_grad_(False), float("nan")
    low, high = torch.tensor([[-1.0, -0.4], [1.0, 0.4]], dtype=torch.float64)
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    actions, clipped = module.sample_actions(agent, torch.zeros(len(noise), dtype=torch.int64), noise, low, high)
    torch.testing.assert_close(actions.mean(0), agent.outputs[0], rtol=0, atol=0.02)
    torch.testing.assert_close(actions.std(0), agent.log_std.exp(), rtol=0.01, atol=0)
    assert actions.dtype == torch.float32 and clipped.dtype == torch.float64, "the environment's own type"
    assert torch.equal(clipped, actions.double().clamp(low, high)), "0.4 is 0.4, not the float32 next to it"
    assert (clipped == low).any() and (clipped == high).any()

    agent, broken = Table(torch.zeros(2, 2), torch.zeros(2)), torch.tensor([[nan, 0.0], [float("inf"), nan]])
    agent.outputs.data.copy_(broken)
    drawn, clipped = module.sample_actions(agent, torch.arange(2), torch.zeros(2, 2), low, high)
    assert clipped.tolist() == [[-1, 0], [1, -0.4]], "an environment gets numbers within its bounds, whatever happens"
    assert torch.equal(drawn.isnan(), broken.isnan()), "and the loss gets what was drawn"


@pytest.mark.parametrize("module", agents_with("ppo_loss") + agents_with("q_lambda"))
def test_noise_is_as_told_and_permutations_fresh_every_time(module):
    name = "noise" if continuous(module.__name__) else "gumbel"
    mean, variance = (0, 1) if continuous(module.__name__) else (np.euler_gamma, np.pi**2 / 6)
    rollout = SimpleNamespace(permutations=torch.zeros(3, 50, dtype=torch.int64), **{name: torch.zeros(100, 20, 10)})
    noise, generator, before = getattr(rollout, name), torch.Generator().manual_seed(1), None
    for _ in range(2):
        module.draw_noise(rollout, generator)
        assert noise.isfinite().all()
        assert abs(noise.mean() - mean) < 0.03 and abs(noise.var() - variance) < 0.1
        assert (rollout.permutations.sort(1).values == torch.arange(50)).all()
        if before:
            assert not torch.equal(before[0], noise) and not torch.equal(before[1], rollout.permutations)
        before = noise.clone(), rollout.permutations.clone()


def minibatch(module, rows, seed):
    rng = np.random.default_rng(seed)
    return {
        "obs": np.arange(rows),
        "actions": rng.normal(size=(rows, 3)) if continuous(module.__name__) else rng.integers(3, size=rows),
        "logprobs": -rng.exponential(size=rows),
        "values": rng.normal(size=rows),
        "advantages": rng.normal(size=rows),
        "returns": rng.normal(size=rows),
        "valid": (rng.random(rows) < 0.8).astype(float),
    }


@pytest.mark.parametrize("module", agents_with("ppo_loss"))
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_is_the_papers(module, norm_adv, clip_vloss):
    rows, clip = 50, 0.2
    args = module.Args(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=clip, ent_coef=0.03, vf_coef=0.7)
    rng, data = np.random.default_rng(0), minibatch(module, rows, seed=1)
    new_values = rng.normal(size=rows)
    agent = Table(torch.tensor(rng.normal(size=(rows, 3))), torch.tensor(new_values))
    new_logprobs, entropies, _ = module.evaluate_actions(agent, data["obs"], torch.tensor(data["actions"]))
    data["logprobs"] = new_logprobs.detach().numpy() + rng.normal(size=rows) / 3
    loss, metrics = module.ppo_loss(agent, args, **{k: torch.tensor(v) for k, v in data.items()})

    keep = data["valid"] == 1  # numpy leaves the reset rows out instead of giving them no weight
    ratio = np.exp(new_logprobs.detach().numpy() - data["logprobs"])[keep]
    advantages, returns, values = (data[name][keep] for name in ("advantages", "returns", "values"))
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss = -np.minimum(advantages * ratio, advantages * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    v_error = (new_values[keep] - returns) ** 2
    if clip_vloss:
        v_error = np.maximum(v_error, (values + np.clip(new_values[keep] - values, -clip, clip) - returns) ** 2)
    entropy = entropies.detach().numpy()[keep].mean()
    expected = [pg_loss, 0.5 * v_error.mean(), entropy, -np.log(ratio).mean(), (ratio - 1 - np.log(ratio)).mean()]
    expected.append((abs(ratio - 1) > clip).mean())
    np.testing.assert_allclose(metrics, expected, rtol=1e-9)
    assert loss.item() == pytest.approx(pg_loss + 0.7 * 0.5 * v_error.mean() - 0.03 * entropy, rel=1e-9)
    assert len(metrics) == len(module.METRICS) - 1


@pytest.mark.parametrize("module", agents_with("ppo_loss"))
def test_reset_rows_teach_nothing(module):
    rows = 30
    data = {k: torch.tensor(v) for k, v in minibatch(module, rows, seed=2).items()}
    reset = data["valid"] == 0
    assert reset.any()
    gradients = []
    for spoil in (0.0, 5.0):
        for name in ("logprobs", "values", "advantages", "returns"):
            data[name][reset] += spoil
        agent = Table(torch.linspace(-1, 1, rows * 3).view(rows, 3).double(), torch.linspace(-1, 1, rows).double())
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
    np.testing.assert_allclose(metrics, [0.5 * (errors**2).mean(), q_values[valid].mean()], rtol=1e-9)
    assert loss.item() == metrics[0] and len(metrics) == len(module.METRICS) - 1
    expected = np.zeros((rows, 3))  # of each row that counts, the action taken alone
    expected[valid, actions[valid]] = errors / valid.sum()
    np.testing.assert_allclose(table.grad, expected, rtol=1e-9)


@pytest.mark.parametrize("module", agents_with("max_q"))
def test_max_q_is_the_largest_q_value(module):
    table = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    assert module.max_q(lambda obs: table[obs], [0, 1]).tolist() == [3, -1]


@pytest.mark.parametrize("module", by_actions("evaluate_actions", real=True))
def test_log_densities_and_entropy_are_the_gaussians(module):
    agent = Table(torch.randn(20, 5, dtype=torch.float64), torch.randn(20, dtype=torch.float64))
    actions = torch.randn(20, 5, dtype=torch.float64) * 3
    logprobs, entropy, values = module.evaluate_actions(agent, torch.arange(20), actions)
    gaussian = torch.distributions.Independent(torch.distributions.Normal(agent.outputs, agent.log_std.exp()), 1)
    torch.testing.assert_close(logprobs, gaussian.log_prob(actions))
    torch.testing.assert_close(entropy, gaussian.entropy())
    assert torch.equal(values, agent.values)


def check_gradients(gradients, num_metrics: int, max_norm: float) -> None:
    """gradients(loss_fn, params, max_norm, *inputs) has to give what backward and clip_grad_norm_ give, and the metrics
    of loss_fn, of which there are num_metrics, with the norm before the cut.
    """

    def loss_fn(images, weight, bias):
        loss = ((images * weight.contiguous()).sum() + bias.square().sum()).tanh()
        return loss, loss.detach() * torch.arange(1, 1 + num_metrics)

    torch.manual_seed(0)
    images = torch.randn(4, 3, 2, 2)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    params = weight, torch.full((5,), 0.1, requires_grad=True)
    grads, metrics = gradients(loss_fn, params, max_norm, images, *params)
    loss, expected = loss_fn(images, *params)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    for param, grad in zip(params, grads):
        torch.testing.assert_close(grad, param.grad)
        assert grad.stride() == param.stride(), "fused Adam would otherwise mix the elements up, and say nothing"
    torch.testing.assert_close(metrics, torch.cat([expected, norm[None]]))


@pytest.mark.parametrize("module", agents_with("gradients"))
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_those_of_backward_and_clipped_together(module, max_norm):
    check_gradients(module.gradients, 1, max_norm)


@pytest.mark.parametrize("module", agents_with("step_adam"))
def test_adam_written_out_is_torchs(module):
    """From any step on, with a learning rate for each group, for the parameters named alone, and back again."""

    def make():
        torch.manual_seed(0)
        params = [torch.randn(shape, requires_grad=True) for shape in ((4, 3), (5,), ())]
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": torch.tensor(0.01)}]
        return params, torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-3, fused=True)

    (params, reference), (others, optimizer) = make(), make()
    for number in range(12):
        if number == 3:
            module.spell_out(optimizer)
        chosen = [0, 2] if number % 2 else [0, 1, 2]
        grads = [torch.randn(params[index].shape) for index in chosen]
        module.step_optimizer(reference, [params[index] for index in chosen], grads)
        step = module.step_adam if 3 <= number < 9 else module.step_optimizer
        step(optimizer, [others[index] for index in chosen], grads)
        for param, other in zip(params, others):
            torch.testing.assert_close(param, other)
            for name, value in reference.state[param].items():
                torch.testing.assert_close(value, optimizer.state[other][name])


@pytest.mark.parametrize("module", agents_with("step_adam"))
@pytest.mark.parametrize("more", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_adam_written_out_refuses_what_it_would_leave_out(module, more):
    with pytest.raises(ValueError, match="step_adam"):
        module.spell_out(torch.optim.Adam([torch.zeros(2, requires_grad=True)], **more))


@pytest.mark.parametrize("module", agents_with("Critics"))
@pytest.mark.parametrize("network", ["critics", "actor"])
def test_bf16_rounds_the_hidden_layers_and_nothing_else(module, network):
    obs, actions = torch.randn(64, 17), torch.randn(64, 6)
    takes_noise = "sac" in module.__name__

    def run(agent):
        if network == "critics":
            return agent.critics(obs, actions)
        return agent.actor(obs, torch.zeros(64, 6))[0] if takes_noise else agent.actor(obs)

    outputs = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        agent = module.Agent((17,), 6, bf16)
        outputs[bf16] = run(agent)
        assert outputs[bf16].dtype == torch.float32 and all(p.dtype == torch.float32 for p in agent.parameters())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
            assert torch.equal(run(agent), outputs[False])
    apart = (outputs[True] - outputs[False]).abs().max() / outputs[False].std()
    assert 1e-5 < apart < 5e-2
