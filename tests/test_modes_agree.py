"""Eager, compiled and captured: the same functions, so the same weights."""

import copy
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agents_with, continuous

needs_gpu = pytest.mark.gpu
MODES = ["compile", *(pytest.param(mode, marks=needs_gpu) for mode in ("cudagraphs", "compile-cudagraphs"))]


def build(module, mode, device, **settings):
    """An agent whose steps and learning phase are bound to `mode`, beside what they are bound to."""
    args = module.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2, **settings)
    pixels = "atari" in module.__name__
    box = gymnasium.spaces.Box
    pictures = 1 if "lstm" in module.__name__ else 4
    space = box(0, 255, (pictures, 84, 84), np.uint8) if pixels else box(-1, 1, (6,), np.float32)
    actions = box(-1, 1, (3,), np.float64) if continuous(module.__name__) else gymnasium.spaces.Discrete(3)
    envs = SimpleNamespace(single_observation_space=space, single_action_space=actions)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    agent = module.Agent(3).to(memory_format=torch.channels_last) if pixels else module.Agent(space.shape, 3)
    agent.to(device)
    # larger steps on random data are chaotic: at 1e-4, weights changed by 1e-7 are apart by 5 % of their way after ten
    # iterations, eager as they may be; at 1e-5 by 0.01 %
    lr = torch.tensor(1e-5, device=device)
    kind, options = torch.optim.Adam, {"eps": 1e-5, "fused": True}
    if "pqn" in module.__name__:
        kind, options = torch.optim.RAdam, {"foreach": True}
    optimizer = kind(agent.parameters(), lr, capturable=device == "cuda", **options)
    rollout, metrics = module.Rollout(args, envs, torch.device(device)), torch.zeros(len(module.METRICS), device=device)
    acts, learn = module.accelerate(mode, agent, optimizer, rollout, args, metrics)
    return SimpleNamespace(**locals())


def iterate(it, number):
    """One iteration on data that depends on `number` alone; returns the actions that were chosen."""
    rng, actions = np.random.default_rng(number), []
    it.module.draw_noise(it.rollout, torch.Generator(it.device).manual_seed(number))
    dones = rng.random(it.rollout.dones.shape) < 0.2
    for t, act in enumerate(it.acts):
        shape = it.rollout.host_obs.shape
        it.rollout.host_dones[t].copy_(torch.tensor(dones[t]))
        it.rollout.host_obs.copy_(torch.tensor(rng.integers(256, size=shape) if it.pixels else rng.normal(size=shape)))
        act()
        if it.device == "cuda":
            torch.cuda.synchronize()
        actions.append(it.rollout.host_actions.clone())
    it.rollout.host_rewards.copy_(torch.tensor(rng.normal(size=it.rollout.rewards.shape)))
    it.rollout.host_dones[-1].copy_(torch.tensor(dones[-1]))
    it.rollout.host_terminations.copy_(torch.tensor(dones[1:] & (rng.random(dones[1:].shape) < 0.5)))
    it.learn()
    drawn, taken = it.rollout.actions.cpu(), torch.stack(actions)
    assert torch.equal(taken, drawn.clamp(-1, 1).double() if continuous(it.module.__name__) else drawn.int())
    return taken


def weights(it):
    return torch.cat([p.detach().flatten().cpu() for p in it.agent.parameters()])


def same_actions(it, one, other):
    return torch.allclose(one, other, rtol=0, atol=1e-4) if continuous(it.module.__name__) else torch.equal(one, other)


def device_of(mode):
    return "cuda" if "cudagraphs" in mode else "cpu"


@pytest.mark.parametrize("module", agents_with("accelerate", "sample_actions"))
@pytest.mark.parametrize("mode", MODES)
def test_ten_updates_give_the_same_weights(module, mode):
    eager, fast = (build(module, m, device_of(mode)) for m in ("eager", mode))
    start = weights(eager)
    assert torch.equal(start, weights(fast)), "the warm-up has to leave no trace"
    for number in range(10):
        assert same_actions(eager, iterate(eager, number), iterate(fast, number))
        if number == 0:  # later ones differ by what rounding has grown to
            torch.testing.assert_close(eager.metrics, fast.metrics, rtol=1e-4, atol=1e-5)
    for one, other in zip(eager.agent.buffers(), fast.agent.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    moved, apart = (weights(eager) - start).norm(), (weights(eager) - weights(fast)).norm()
    assert apart < 1e-4 * weights(eager).norm()
    assert apart < 1e-2 * moved, "and that is not for want of learning"


@pytest.mark.parametrize("module", agents_with("accelerate", "sample_actions"))
@pytest.mark.parametrize("mode", MODES)
def test_what_changes_outside_takes_effect_inside(module, mode):
    """The learning rate, the parameters, the noise and epsilon are read at every call, not frozen at the first."""
    it = build(module, mode, device_of(mode))
    iterate(it, 0)
    before = weights(it)
    it.lr.zero_()
    iterate(it, 1)
    assert torch.equal(before, weights(it))
    first = iterate(it, 2)
    assert not torch.equal(first, iterate(it, 3)), "other noise, other actions"
    with torch.no_grad():
        head = next(m for m in it.agent.modules() if getattr(m, "out_features", 0) == 3)
        head.bias[0] += 50
    actions = iterate(it, 4)
    chosen = actions[..., 0] == 1 if continuous(module.__name__) else actions == 0
    assert chosen.all(), "a policy made to always choose action 0, or to turn number 0 up to the limit"
    if hasattr(it.agent, "epsilon"):
        it.agent.epsilon.fill_(1)
        assert (iterate(it, 5) != 0).any(), "and then made to explore"


@pytest.mark.parametrize("module", agents_with("warm_up"))
def test_warm_up_leaves_no_trace(module):
    """Neither in parameters nor in optimizer state, whether that state is new or older than the warm-up."""
    it = build(module, "eager", "cpu")
    iterate(it, 0)
    states = it.optimizer.state
    before = copy.deepcopy((it.agent.state_dict(), it.optimizer.state_dict()["state"]))
    tensors = [*it.agent.parameters(), *it.agent.buffers(), *(x for s in states.values() for x in s.values())]
    module.warm_up(it.learn, lambda: tensors)
    after = it.agent.state_dict(), it.optimizer.state_dict()["state"]
    for old, new in zip(before[0].values(), after[0].values()):
        assert torch.equal(old, new)
    for old, new in zip(before[1].values(), after[1].values()):
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.gpu
@pytest.mark.parametrize("module", agents_with("capture"))
def test_replays_neither_allocate_nor_sync(module):
    it = build(module, "compile-cudagraphs", "cuda")
    iterate(it, 0)
    torch.cuda.synchronize()
    allocated, generator = torch.cuda.memory_allocated(), torch.Generator("cuda").manual_seed(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            it.lr.fill_(1e-4)
            module.draw_noise(it.rollout, generator)
            for act in it.acts:
                act()
                event = torch.cuda.Event()
                event.record()
                event.synchronize()  # the one wait
            it.learn()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert it.rollout.host_obs.is_pinned() and it.rollout.host_actions.is_pinned()
