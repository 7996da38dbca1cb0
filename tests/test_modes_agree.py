"""Eager, compiled and captured: the same functions, so the same weights."""

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agents_with, continuous
from emulation import emulated_graphs
from torch.utils._python_dispatch import TorchDispatchMode

needs_gpu = pytest.mark.gpu
MODES = ["compile", "emulated", *(pytest.param(f"{c}cudagraphs", marks=needs_gpu) for c in ("", "compile-"))]


def build(module, mode, device, **settings):
    """An agent whose steps and learning phase are bound to `mode`, beside what they are bound to.

    The mode "emulated" is cudagraphs, on a CPU.
    """
    sizes, replays = {"num_steps": 8, "num_minibatches": 2, "update_epochs": 2}, hasattr(module, "collect")
    if replays:  # two updates for one step of every environment
        ratio = {"train_frequency": 2} if "dqn" in module.__name__ else {"utd": 0.5}
        sizes = ratio | {"batch_size": 8, "buffer_size": 64}
    args = module.Args(num_envs=4, **sizes, **settings)
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
    emulated = mode == "emulated"
    # of a fused Adam the host reads nothing on a CPU, where it would not take the flag
    capturable = device == "cuda" or emulated and kind is torch.optim.RAdam
    optimizer = kind(trained(agent), lr, capturable=capturable, **options)
    rollout, metrics = module.Rollout(args, envs, torch.device(device)), torch.zeros(len(module.METRICS), device=device)
    if replays:
        replay = getattr(module, "Replay", getattr(module, "FrameReplay", None))(64, rollout, torch.device(device))
        inputs = agent, optimizer, replay, rollout, args, metrics
        with emulated_graphs() if emulated else nullcontext():
            acts, store, update = module.accelerate("cudagraphs" if emulated else mode, *inputs)

        def learn():
            store()
            update()

    else:
        inputs = agent, optimizer, rollout, args, metrics
        with emulated_graphs() if emulated else nullcontext():
            acts, learn = module.accelerate("cudagraphs" if emulated else mode, *inputs)
    return SimpleNamespace(**locals())


def trained(agent):
    """The parameters that gradients change; those of target networks follow them."""
    return [p for p in agent.parameters() if p.requires_grad]


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
    if hasattr(it.rollout, "host_ages"):
        it.rollout.host_ages.copy_(torch.tensor(rng.integers(4, size=it.rollout.ages.shape)))
    it.learn()
    drawn, taken = it.rollout.actions.cpu(), torch.stack(actions)
    assert torch.equal(taken, drawn.clamp(-1, 1).double() if continuous(it.module.__name__) else drawn.int())
    return taken


def weights(it):
    return torch.cat([p.detach().flatten().cpu() for p in trained(it.agent)])


def same_actions(it, one, other):
    return torch.allclose(one, other, rtol=0, atol=1e-4) if continuous(it.module.__name__) else torch.equal(one, other)


def device_of(mode):
    return "cuda" if "cudagraphs" in mode else "cpu"


@functools.cache
def ten_iterations(module, mode, device):
    """The agent after ten iterations, its weights before and after, and the actions and metrics of each.

    For the first test of each mode to compare, and the second to go on with.
    """
    it = build(module, mode, device)
    start, seen = weights(it), [(iterate(it, number), it.metrics.clone()) for number in range(10)]
    return it, start, weights(it), seen


@pytest.mark.parametrize("module", agents_with("accelerate", "sample_actions"))
@pytest.mark.parametrize("mode", MODES)
def test_ten_updates_give_the_same_weights(module, mode):
    eager, start, expected, reference = ten_iterations(module, "eager", device_of(mode))
    fast, same_start, trained_to, seen = ten_iterations(module, mode, device_of(mode))
    assert torch.equal(start, same_start), "the warm-up has to leave no trace"
    for number, ((actions, metrics), (same, close)) in enumerate(zip(reference, seen)):
        assert same_actions(eager, actions, same)
        if number == 0:  # later ones differ by what rounding has grown to
            torch.testing.assert_close(metrics, close, rtol=1e-4, atol=1e-5)
    for one, other in zip(eager.agent.buffers(), fast.agent.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    moved, apart = (expected - start).norm(), (expected - trained_to).norm()
    assert apart < 1e-4 * expected.norm()
    assert apart < 1e-2 * moved, "and that is not for want of learning"


@pytest.mark.parametrize("module", agents_with("accelerate", "sample_actions"))
@pytest.mark.parametrize("mode", MODES)
def test_what_changes_outside_takes_effect_inside(module, mode):
    """The learning rate, the parameters, the noise and epsilon are read at every call, not frozen at the first."""
    it, *_ = ten_iterations(module, mode, device_of(mode))
    before = weights(it)
    it.lr.zero_()
    iterate(it, 1)
    assert torch.equal(before, weights(it))
    first = iterate(it, 2)
    assert not torch.equal(first, iterate(it, 3)), "other noise, other actions"
    with torch.no_grad():
        head = next(m for m in it.agent.modules() if getattr(m, "out_features", 0) in (3, 6))  # 6: with deviations
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
    tensors += it.replay.buffers() if it.replays else []
    module.warm_up(it.learn, lambda: tensors)
    after = it.agent.state_dict(), it.optimizer.state_dict()["state"]
    for old, new in zip(before[0].values(), after[0].values()):
        assert torch.equal(old, new)
    for old, new in zip(before[1].values(), after[1].values()):
        assert all(torch.equal(old[key], new[key]) for key in old)


class NoReads(TorchDispatchMode):
    """Fails at whatever would make the host wait for a device, and so could not be captured."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("module", agents_with("accelerate"))
def test_no_step_reads_a_tensor_on_the_host(module, monkeypatch):
    """What a CUDA graph could not hold shows on a CPU as well."""
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReads():
        torch.arange(3)[torch.tensor(1)]
    it = build(module, "eager", "cpu")
    iterate(it, 0)
    monkeypatch.setattr(it.optimizer, "step", lambda: None)  # on a CPU it may: capturable=True is for CUDA
    with NoReads():
        for act in it.acts:
            act()
        it.learn()


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
