"""Eager, compiled and captured: the same functions, so the same weights."""

import copy
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agents_with

needs_gpu = pytest.mark.gpu
MODES = ["compile", *(pytest.param(mode, marks=needs_gpu) for mode in ("cudagraphs", "compile-cudagraphs"))]


def build(module, mode, device, **settings):
    """An agent whose steps and learning phase are bound to `mode`, beside what they are bound to."""
    args = module.Args(num_envs=4, num_steps=8, num_minibatches=2, update_epochs=2, **settings)
    pixels = "atari" in module.__name__
    box = gymnasium.spaces.Box
    space = box(0, 255, (4, 84, 84), np.uint8) if pixels else box(-1, 1, (6,), np.float32)
    envs = SimpleNamespace(single_observation_space=space, single_action_space=gymnasium.spaces.Discrete(3))
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    agent = (module.Agent(3) if pixels else module.Agent(space.shape, 3)).to(device)
    # large steps on random data are chaotic: at 2.5e-4 a change of 1e-7 grows to 1e-2 in ten iterations, eager or not
    lr = torch.tensor(1e-4, device=device)
    kind, options = torch.optim.Adam, {"eps": 1e-5, "fused": True}
    if "pqn" in module.__name__:
        kind, options = torch.optim.RAdam, {"foreach": True}
    optimizer = kind(agent.parameters(), lr, capturable=device == "cuda", **options)
    rollout, metrics = module.Rollout(args, envs, torch.device(device)), torch.zeros(len(module.METRICS), device=device)
    acts, learn = module.accelerate(mode, agent, optimizer, rollout, args, metrics)
    return SimpleNamespace(**locals())


def iterate(it, number):
    """One iteration on data that depends on `number` alone; returns the actions that were chosen."""
    rng = np.random.default_rng(number)
    it.rollout.gumbel.copy_(torch.tensor(rng.gumbel(size=it.rollout.gumbel.shape)))
    for permutation in it.rollout.permutations:
        permutation.copy_(torch.tensor(rng.permutation(len(permutation))))
    actions = []
    for act in it.acts:
        shape = it.rollout.host_obs.shape
        it.rollout.host_obs.copy_(torch.tensor(rng.integers(256, size=shape) if it.pixels else rng.normal(size=shape)))
        act()
        if it.device == "cuda":
            torch.cuda.synchronize()
        actions.append(it.rollout.host_actions.clone())
    it.rollout.host_rewards.copy_(torch.tensor(rng.normal(size=it.rollout.rewards.shape)))
    dones = rng.random(it.rollout.dones.shape) < 0.2
    it.rollout.host_dones.copy_(torch.tensor(dones))
    it.rollout.host_terminations.copy_(torch.tensor(dones[1:] & (rng.random(dones[1:].shape) < 0.5)))
    it.learn()
    assert torch.equal(torch.stack(actions), it.rollout.actions.cpu().int())
    return torch.stack(actions)


def weights(it):
    return torch.cat([p.detach().flatten().cpu() for p in it.agent.parameters()])


def device_of(mode):
    return "cuda" if "cudagraphs" in mode else "cpu"


@pytest.mark.parametrize("module", agents_with("accelerate", "sample_actions"))
@pytest.mark.parametrize("mode", MODES)
def test_ten_updates_give_the_same_weights(module, mode):
    eager, fast = (build(module, m, device_of(mode)) for m in ("eager", mode))
    start = weights(eager)
    assert torch.equal(start, weights(fast)), "the warm-up has to leave no trace"
    for number in range(10):
        assert torch.equal(iterate(eager, number), iterate(fast, number))
        if number == 0:  # later ones differ by what rounding has grown to
            torch.testing.assert_close(eager.metrics, fast.metrics, rtol=1e-4, atol=1e-5)
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
    assert (iterate(it, 4) == 0).all(), "a policy made to always choose action 0"
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
    module.warm_up(it.learn, lambda: [*it.agent.parameters(), *(x for s in states.values() for x in s.values())])
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
