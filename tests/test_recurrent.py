"""Recurrent agents: what the state of the LSTM is at every boundary, and that it remembers."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agent_named, agents_with
from test_modes_agree import build, iterate

recurrent = pytest.mark.parametrize("module", agents_with("remember"))


def sequences(T, N, seed):
    """Pictures, a state that is not zero and dones, as `remember` takes them."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randint(256, (T, N, 1, 21, 21, 16), dtype=torch.uint8, generator=generator)
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
    torch.testing.assert_close(memories, outputs.flatten(0, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, torch.cat(ends), rtol=1e-5, atol=1e-6)


@recurrent
@torch.no_grad()
def test_a_sequence_cut_in_two_is_one(module):
    agent, (obs, state, dones) = module.Agent(3), sequences(8, 3, seed=1)
    whole, after = module.remember(agent, obs, state, dones)
    for cut in (1, 5):
        first, middle = module.remember(agent, obs[:cut], state, dones[:cut])
        second, end = module.remember(agent, obs[cut:], middle, dones[cut:])
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(end, after, rtol=1e-5, atol=1e-6)


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


@recurrent
def test_learning_sees_what_acting_saw(module, monkeypatch):
    """Log-probabilities recomputed from the stored state are those acted on, through ends and over three rollouts."""
    acted, learnt, valued = [], [], []
    sample_actions, ppo_loss, gae = module.sample_actions, module.ppo_loss, module.gae

    def sample(agent, memories, gumbel):
        acted.append(agent.policy(memories).log_softmax(-1))
        return sample_actions(agent, memories, gumbel)

    def loss(agent, args, memories, actions, logprobs, *rest):
        with torch.no_grad():
            learnt.append((logprobs, module.evaluate_actions(agent, memories, actions)[0]))
        return ppo_loss(agent, args, memories, actions, logprobs, *rest)

    def targets(rewards, values, *rest):
        valued.append(values)
        return gae(rewards, values, *rest)

    for name, function in {"sample_actions": sample, "ppo_loss": loss, "gae": targets}.items():
        monkeypatch.setattr(module, name, function)
    it = build(module, "eager", "cpu")
    it.lr.fill_(0.003)
    for number in range(3):
        acted.clear(), learnt.clear()
        before, state = copy.deepcopy(it.agent), it.rollout.state.clone()
        assert torch.equal(state, it.rollout.first_state) and (number == 0) == (state == 0).all()
        actions = iterate(it, number).long()
        chosen = torch.stack(acted).gather(-1, actions[..., None]).squeeze(-1)
        for envs, (logprobs, _) in zip(it.rollout.permutations[0].split(2), learnt):
            torch.testing.assert_close(logprobs, chosen[:, envs].flatten(), rtol=0, atol=1e-5)
        torch.testing.assert_close(*learnt[0], rtol=0, atol=1e-6)  # the ratio starts at 1
        assert not torch.allclose(*learnt[-1], rtol=0, atol=1e-3), "and moves"
        with torch.no_grad():  # the bootstrap too, as if all T + 1 rows were one sequence
            memories, _ = module.remember(before, it.rollout.obs, state, it.rollout.dones)
            torch.testing.assert_close(valued[-1].flatten(), before.value(memories), rtol=0, atol=1e-5)
        ended = it.rollout.dones[len(acted) - 1] == 1
        assert torch.equal((it.rollout.state == 0).all(-1), ended.expand(2, -1))


@recurrent
def test_refuses_minibatches_that_would_cut_sequences(module, tmp_path, capfd):
    sizes = {"num_envs": 6, "num_steps": 8, "num_minibatches": 4, "total_timesteps": 48}
    with pytest.raises(SystemExit) as end:
        module.main(module.Args(**sizes, run_dir=str(tmp_path / "run")))
    assert end.value.code == 2 and "--num-minibatches 4" in capfd.readouterr().err and not list(tmp_path.iterdir())


# ---- a task that needs a memory --------------------------------------------------------------------------------------


class Recall:
    """Games whose first picture is bright on one side; five dark ones later, the action has to name that side.

    Right is worth 1, wrong -1, and guessing 0. `stack` pictures are shown at a time, the newest last.
    """

    delay = 5
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, num_envs, seed, stack):
        self.rng, self.num_envs = np.random.default_rng(seed), num_envs
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (stack, 84, 84), np.uint8)
        self.obs = np.zeros((num_envs, stack, 84, 84), np.uint8)
        self.elapsed, self.sides = np.full(num_envs, self.delay + 1), np.zeros(num_envs, int)

    def reset(self):
        self.__init__(self.num_envs, self.rng, self.obs.shape[1])
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
        infos = {"info:reward": rewards, "info:terminated": ending}
        return self.obs.copy(), rewards, ending, np.zeros_like(ending), infos


def play_recall(agent, stack, convolutional, monkeypatch, tmp_path, seed=1):
    """Train an agent on Recall as its `main` does and return the mean of 200 games afterwards."""
    module = agent_named(agent)

    class Sparse(module.Agent):
        """The agent, but for one layer over every twelfth pixel in place of its convolutions: far cheaper."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.convolutions, self.linear = None, module.layer_init(torch.nn.Linear(49 * stack, 512))

        def hidden(self, obs):
            return self.linear(obs[..., 1::3, 1::3, 10].flatten(1) / 255).relu()

    monkeypatch.setattr(module, "make_envs", lambda args, num_envs, seed: Recall(num_envs, seed, stack))
    if not convolutional:
        monkeypatch.setattr(module, "Agent", Sparse)
    sizes = {"num_envs": 16, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 40 * 16 * 16}
    machine = {"device": "cpu", "precision": "fp32", "torch_threads": 1}
    args = module.Args(seed, **sizes, **machine, learning_rate=1e-3, eval_episodes=200, run_dir=str(tmp_path / agent))
    return module.main(args)["eval_return_mean"]


@pytest.mark.parametrize("convolutional", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recalls_what_a_stack_of_pictures_cannot(convolutional, monkeypatch, tmp_path):
    """Perfect is 1 and guessing 0."""
    assert play_recall("ppo_atari_lstm", 1, convolutional, monkeypatch, tmp_path) > 0.9
    assert abs(play_recall("ppo_atari", 4, convolutional, monkeypatch, tmp_path)) < 0.4


@recurrent
def test_an_evaluated_game_begins_with_a_zero_state(module, monkeypatch):
    seen, remember = [], module.remember

    def record(agent, obs, state, dones):
        seen.append((obs[0, :, 0].amax((1, 2, 3)) > 0, state.abs().amax((0, 2))))
        return remember(agent, obs, state, dones)

    monkeypatch.setattr(module, "remember", record)
    module.evaluate(module.Agent(2), Recall(3, seed=0, stack=1), 9, torch.Generator().manual_seed(0))
    first_picture, state = map(torch.cat, zip(*seen))
    assert first_picture.sum() >= 9 and torch.equal(first_picture, state == 0)
