"""Recurrent agents: what the state of the LSTM is at every boundary, and that it remembers."""

import copy
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with, first_fast

recurrent = pytest.mark.parametrize("module", agents_with("remember"))


def sequences(T, N, seed):
    """Pictures, a state that is not zero and dones, as `remember` takes them."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randint(256, (T, N, 1, 84, 84), dtype=torch.uint8, generator=generator)
    dones = (torch.rand(T, N, generator=generator) < 0.3).float()
    return obs, torch.randn(2, N, 128, generator=generator), dones


@recurrent
@torch.no_grad()
def test_without_ends_it_is_torchs_lstm(module):
    agent, lstm, (obs, state, dones) = module.Agent(3), torch.nn.LSTM(512, 128), sequences(6, 2, seed=0)
    for bias in (agent.input_gates.bias, agent.state_gates.bias):
        bias.normal_()  # zero at the start
    lstm.weight_ih_l0[:], lstm.bias_ih_l0[:] = agent.input_gates.weight, agent.input_gates.bias
    lstm.weight_hh_l0[:], lstm.bias_hh_l0[:] = agent.state_gates.weight, agent.state_gates.bias
    memories, after = module.remember(agent, obs, state, torch.zeros_like(dones))
    outputs, ends = lstm(agent.hidden(obs.flatten(0, 1)).view(6, 2, 512), tuple(state[:, None]))
    torch.testing.assert_close(memories, outputs.flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, torch.cat(ends), rtol=1e-4, atol=1e-5)


@recurrent
@torch.no_grad()
def test_a_sequence_cut_in_two_is_one(module):
    agent, (obs, state, dones) = module.Agent(3), sequences(8, 3, seed=1)
    whole, after = module.remember(agent, obs, state, dones)
    for cut in (1, 5):
        first, middle = module.remember(agent, obs[:cut], state, dones[:cut])
        second, end = module.remember(agent, obs[cut:], middle, dones[cut:])
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end, after, rtol=1e-4, atol=1e-5)


@recurrent
@torch.no_grad()
def test_an_episode_begins_with_a_zero_state(module):
    """The observation that came with a done still belongs to the old episode, the next one to the new one alone."""
    agent, (obs, state, dones) = module.Agent(3), sequences(5, 2, seed=2)
    dones[:] = 0
    unbroken = module.remember(agent, obs, state, dones)[0].view(5, 2, -1)
    dones[2, 0] = 1
    memories = module.remember(agent, obs, state, dones)[0].view(5, 2, -1)
    fresh = module.remember(agent, obs[3:], torch.zeros_like(state), dones[3:])[0].view(2, 2, -1)
    torch.testing.assert_close(memories[:3], unbroken[:3])
    torch.testing.assert_close(memories[3:, 1], unbroken[3:, 1])
    torch.testing.assert_close(memories[3:, 0], fresh[:, 0])
    assert (memories[3:, 0] - unbroken[3:, 0]).abs().min(-1).values.max() > 0
    dones[4, 1] = 1
    after = module.remember(agent, obs, state, dones)[1]
    assert (after[:, 1] == 0).all() and (after[:, 0] != 0).all()


def play(acts, rollout, rng):
    """One rollout on random pictures and dones, which follow those of the rollout before."""
    outcomes = rollout.host_outcomes
    outcomes[:, 0] = outcomes[:, -1].clone()
    for t, step in enumerate(acts):
        rollout.host_obs.copy_(torch.tensor(rng.integers(256, size=rollout.host_obs.shape)))
        step()
        dones = rng.random(outcomes.shape[2]) < 0.2
        outcomes[:, t + 1] = torch.tensor(np.stack([rng.normal(size=dones.shape), dones, dones]))
    rollout.host_obs.copy_(torch.tensor(rng.integers(256, size=rollout.host_obs.shape)))


def outputs(module, agent, memories, actions):
    """What acting stores of the agent's outputs, each [batch]: log-probabilities of the actions, if any, and values."""
    if hasattr(module, "q_lambda"):
        return [agent(memories).amax(-1)]
    logprobs, _, values = module.evaluate_actions(agent, memories, actions)
    return [logprobs, values]


def of_rollout(module, rollout, args):
    """What acting stored of those outputs, and what the loss is to get beside memories, each [T, N]."""
    rewards, terminations, dones = rollout.outcomes
    data, values, valid = (rewards, rollout.values, terminations, dones), rollout.values[:-1], 1 - dones[:-1]
    if hasattr(module, "q_lambda"):
        return [values], [rollout.actions, module.q_lambda(*data, args.gamma, args.q_lambda), valid]
    advantages = module.gae(*data, args.gamma, args.gae_lambda)
    return [rollout.logprobs, values], [rollout.actions, rollout.logprobs, values, advantages, valid]


@recurrent
def test_learning_sees_what_acting_saw(module):
    """Outputs recomputed from the stored state are those acted on, through ends and over three rollouts.

    And each row of a minibatch has its own action, target and mark of a reset row.
    """
    loss = "td_loss" if hasattr(module, "td_loss") else "ppo_loss"
    args = module.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2)
    actions = gymnasium.spaces.Discrete(3)
    pictures = gymnasium.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    envs, device = SimpleNamespace(single_observation_space=pictures, single_action_space=actions), torch.device("cpu")
    torch.manual_seed(0)
    agent, rollout, rng = module.Agent(3), module.Rollout(args, envs, device), np.random.default_rng(0)
    optimizer = torch.optim.Adam(agent.parameters(), torch.tensor(0.003), eps=1e-5, fused=True)
    acts, _ = module.accelerate("eager", agent, optimizer, rollout, args)
    for number in range(3):
        learnt, before, state = [], copy.deepcopy(agent), rollout.state.clone()
        assert torch.equal(state, rollout.first_state) and (number == 0) == (state == 0).all()
        module.draw_noise(rollout, torch.Generator().manual_seed(number))
        play(acts, rollout, rng)

        def watch(*inputs):
            memories, *minibatch = [x for x in inputs if isinstance(x, torch.Tensor)]
            with torch.no_grad():
                learnt.append((minibatch, outputs(module, agent, memories, minibatch[0])))  # noqa: B023
            return getattr(module, loss)(*inputs)

        module.update(agent, optimizer, rollout, args, **{loss: watch})
        stored, wanted = of_rollout(module, rollout, args)
        chunks = rollout.permutations.view(4, 2)
        for columns, (minibatch, _) in zip(chunks, learnt, strict=True):
            for given, x in zip(minibatch, wanted, strict=True):
                assert torch.equal(given, x[:, columns].flatten()), "whole sequences of two environments"
        for first, last, x in zip(learnt[0][1], learnt[-1][1], stored, strict=True):
            torch.testing.assert_close(first, x[:, chunks[0]].flatten(), rtol=0, atol=1e-5)  # the ratio starts at 1
            assert not torch.allclose(last, x[:, chunks[-1]].flatten(), rtol=0, atol=1e-3), "and moves"
        with torch.no_grad():  # the bootstrap too, as if all T + 1 rows were one sequence
            memories, _ = module.remember(before, rollout.obs, state, rollout.outcomes[2])
            chosen = torch.cat([rollout.actions, rollout.actions[-1:]]).flatten()  # of the last row there are none
            *logprobs, values = outputs(module, before, memories, chosen)
            torch.testing.assert_close(rollout.values.flatten(), values, rtol=0, atol=1e-5)
            for x in logprobs:
                torch.testing.assert_close(rollout.logprobs.flatten(), x[:-4], rtol=0, atol=1e-5)
        ended = rollout.outcomes[2, -2] == 1
        assert torch.equal((rollout.state == 0).all(-1), ended.expand(2, -1))


@recurrent
def test_refuses_minibatches_that_would_cut_sequences(module):
    sizes = {"num_envs": 6, "num_steps": 8, "total_timesteps": 48}
    module.Args(**sizes, num_minibatches=3)
    with pytest.raises(ValueError, match="--num-minibatches 4"):
        module.Args(**sizes, num_minibatches=4)


# ---- a task that needs a memory --------------------------------------------------------------------------------------


class Recall:
    """Games whose first picture is bright on one side; five dark ones later, the action has to name that side.

    Right is worth 1, wrong -1, and guessing 0. `stack` pictures are shown at a time, the newest last. A game is over
    at every end of number `lives`; those between are lost lives.
    """

    delay, metadata = 5, {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, num_envs, seed, stack, lives=1):
        self.rng, self.num_envs, self.lives, self.ends = np.random.default_rng(seed), num_envs, lives, 0
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (stack, 84, 84), np.uint8)
        self.obs = np.zeros((num_envs, stack, 84, 84), np.uint8)
        self.elapsed, self.sides = np.full(num_envs, self.delay + 1), np.zeros(num_envs, int)

    def reset(self):
        return self.step(np.zeros(self.num_envs))[0], {}

    def step(self, actions):
        ending, starting = self.elapsed == self.delay, self.elapsed > self.delay
        self.elapsed = np.where(starting, 0, self.elapsed + 1)
        rewards = np.where(ending, np.where(actions == self.sides, 1, -1), 0).astype(np.float32)
        self.sides = np.where(starting, self.rng.integers(2, size=self.num_envs), self.sides)
        self.obs[:, :-1] = self.obs[:, 1:]
        self.obs[:, -1] = 0
        self.obs[starting] = 0
        for n in np.flatnonzero(starting):
            half = slice(42) if self.sides[n] == 0 else slice(42, None)
            self.obs[n, -1, :, half] = 255
        self.ends += ending
        infos = {"reward": rewards, "terminated": ending & (self.ends % self.lives == 0)}
        infos["lives"] = (-self.ends % self.lives) + self.lives * (self.ends % self.lives == 0) * ~ending
        return self.obs.copy(), rewards, ending, np.zeros_like(ending), infos


def play_recall(agent, stack, convolutional, precision, monkeypatch, tmp_path, seed=1):
    """Train an agent on Recall as its `main` does and return the mean of 200 games afterwards."""
    module = agent_named(agent)

    class Pixels(torch.nn.Module):
        """Every twelfth pixel of pictures [batch, stack, 84, 84], in a row."""

        def forward(self, pictures):
            return pictures[..., 6::12, 6::12].flatten(1)

    class Sparse(module.Agent):
        """The agent, but for one layer over every twelfth pixel in place of its convolutions: far cheaper."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            linear = module.layer_init(torch.nn.Linear(49 * stack, 512))
            self.network = torch.nn.Sequential(Pixels(), linear, torch.nn.ReLU())

    monkeypatch.setattr(module, "make_envs", lambda args, num_envs, seed: Recall(num_envs, seed, stack))
    if not convolutional:
        monkeypatch.setattr(module, "Agent", Sparse)
    sizes = {"num_envs": 16, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 40 * 16 * 16}
    machine = {"device": "cpu", "precision": precision, "torch_threads": 1}
    args = module.Args(seed, **sizes, **machine, learning_rate=1e-3, eval_episodes=200, run_dir=str(tmp_path / agent))
    return module.main(args)["eval_return_mean"]


@pytest.mark.parametrize("module", first_fast("remember"))
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("convolutional", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recalls_what_a_stack_of_pictures_cannot(module, convolutional, precision, monkeypatch, tmp_path):
    """Perfect is 1 and guessing 0."""
    name, how = module.__name__, (convolutional, precision, monkeypatch, tmp_path)
    assert play_recall(name, 1, *how) > 0.9
    assert abs(play_recall(name.removesuffix("_lstm"), 4, *how)) < 0.4


@recurrent
def test_an_evaluated_episode_begins_with_a_zero_state(module, monkeypatch):
    """After a lost life as well, as in training."""
    seen, remember = [], module.remember

    def record(agent, obs, state, dones):
        seen.append((obs[0].amax((1, 2, 3)) > 0, state.abs().amax((0, 2))))
        return remember(agent, obs, state, dones)

    monkeypatch.setattr(module, "remember", record)
    module.evaluate(module.Agent(2), Recall(3, seed=0, stack=1, lives=3), torch.Generator().manual_seed(0), False)
    first_picture, state = map(torch.cat, zip(*seen))
    assert first_picture.sum() == 9 and torch.equal(first_picture, state == 0)
