"""The GPU path without a GPU: every step of every agent on fake CUDA tensors, which know shapes but not values.

Fails at what would crash on a GPU or could not be captured: tensors of two devices in one operation, a host that waits
for the device or branches on it, memory that is not pinned, a number of the host that a graph would freeze.
"""

import ctypes
import importlib.util
import inspect
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch
from conftest import agents_with, continuous, has_compiler, script
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)"""
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.lift_fresh.default, ATEN.lift_fresh_copy.default}
RANDOM = {torch.Tag.nondeterministic_seeded}
NUMBERS = (int, float, bool)


@pytest.fixture(scope="module", autouse=True)
def cuda_without_cuda(tmp_path_factory):
    """A torch built for the CPU has nothing to say what the current CUDA device is; this says it, and does nothing."""
    if torch.version.cuda:  # built for CUDA: FakeTensorMode sees to it where there is no GPU
        return
    if not has_compiler():
        pytest.skip("needs a C++ compiler")
    source = tmp_path_factory.mktemp("guard") / "guard.cpp"
    source.write_text(GUARD)
    torch_dir = Path(torch.__file__).parent
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_dir}/include", f"-L{torch_dir}/lib", "-lc10"]
    subprocess.run(["g++", source, "-o", source.with_suffix(".so"), *flags], check=True)
    ctypes.CDLL(str(source.with_suffix(".so")))


def tensors(values) -> list:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="module", autouse=True)
def fused_adam():
    """A fused Adam whose learning rate is a tensor is not among torch's own stand-ins; it writes to its arguments."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_adam_.tensor_lr", lambda *_, **__: None, "Meta")
    yield
    library._destroy()


class CaptureRules(TorchDispatchMode):
    """Watches the operations of a step that is to be captured.

    `pinned`: the host's tensors that it may touch. `seen` has every operation with the numbers that the host gave it:
    a graph keeps them. `dtypes`: the types of all results.
    """

    def __init__(self, pinned):
        super().__init__()
        self.pinned, self.count, self.seen = {x.untyped_storage()._cdata for x in pinned}, 0, []
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)  # fails itself at mixed devices, .item(), nonzero and the like
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        host = [x for x in inputs + outputs if x.device.type == "cpu"]
        devices = {x.device.type for x in inputs + outputs}
        assert not RANDOM & set(function.tags), f"{function}: noise is drawn outside of what is captured"
        pinning = function is ATEN.pin_memory.default or (kwargs.get("pin_memory") and outputs)
        assert not pinning, f"{function}: no pinned memory is allocated in a capture"
        if devices == {"cpu", "cuda"}:
            assert function in COPIES, f"{function}: a graph would freeze the host's number"
            for x in host:
                assert x.untyped_storage()._cdata in self.pinned, f"{function}: {tuple(x.shape)} is not pinned memory"
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            assert not blocking, f"{function}: the host would wait"
            from_host = inputs[-1].device.type == "cpu"  # then a change of type or strides would take the host's time
            plain = len({x.dtype for x in inputs + outputs}) == 1 and inputs[-1].is_contiguous()
            assert plain or not from_host, f"{function}: {tuple(x.shape)} is not copied as it lies there"
        self.count += "cuda" in devices
        self.dtypes |= {x.dtype for x in outputs}
        self.seen.append((str(function), [x for x in tree_leaves((args, kwargs)) if isinstance(x, NUMBERS)]))
        return result


def gradients_of_nothing(loss, params, **_):
    """torch.autograd.grad, whose engine a torch without CUDA does not start for a CUDA device."""
    assert loss.device.type == "cuda" and loss.requires_grad and not loss.shape
    return [torch.empty_like(param) for param in params]


def chosen(function, given: dict):
    """Call a function with those of the given arguments that it has."""
    names = inspect.signature(function).parameters
    return function(**{name: value for name, value in given.items() if name in names})


def fake_build(module):
    """What `main` makes of an agent on a GPU, of fake tensors on a fake CUDA device."""
    pixels, real = "atari" in module.__name__, continuous(module.__name__)
    sizes = {"num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "batch_size": 8, "buffer_size": 64}
    args, box = (
        chosen(module.Args, {"num_envs": 4, "total_timesteps": 10**5, "learning_starts": 8} | sizes),
        gymnasium.spaces.Box,
    )
    space = box(0, 255, (1 if "lstm" in module.__name__ else 4, 84, 84), np.uint8)
    space = space if pixels else box(-1, 1, (6,), np.float32)
    actions = box(-1, 1, (3,), np.float32) if real else gymnasium.spaces.Discrete(3)
    envs = SimpleNamespace(single_observation_space=space, single_action_space=actions, num_envs=4)
    device = torch.device("cuda:0")
    network = {"obs_shape": space.shape, "num_actions": 3, "action_dim": 3, "low": [-1.0] * 3, "high": [1.0] * 3}
    network["bf16"] = pixels  # as by default
    with device:
        agent = chosen(module.Agent, network)
    for param in agent.parameters():
        if pixels and param.dim() == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    several = hasattr(module, "Actor") or hasattr(agent, "critics")
    parts = [getattr(agent, "critics", agent), agent.actor] if several else [agent]
    parts[0] = agent.critic if hasattr(agent, "target_critic") else parts[0]
    params = [[p for p in part.parameters() if p.requires_grad] for part in parts]
    optimizers = [torch.optim.Adam(some, fused=True, capturable=True) for some in params]
    if hasattr(args, "learning_rate"):  # set here, as Adam would look whether it is negative
        optimizers[0].param_groups[0]["lr"] = torch.zeros((), device=device)
    given = {"mode": "eager", "agent": agent, "optimizer": optimizers[0], "optimizers": optimizers, "args": args}
    given |= {"envs": envs, "device": device, "noise_size": getattr(agent, "noise_size", 0)}
    given["rollout"] = chosen(module.Rollout, given)
    for name in ("Replay", "FrameReplay", "PrioritizedReplay"):
        if hasattr(module, name):
            given["replay"] = chosen(getattr(module, name), given)
    acts, learn = chosen(module.accelerate, given)
    return SimpleNamespace(**given, steps={"act": acts[0], "last act": acts[-1], "learn": learn})


def lasting(it) -> dict:
    """The addresses of all that outlives a step: a tensor put in another's place would be lost on a graph."""
    state = [(param, key) for optimizer in it.optimizers for param, s in optimizer.state.items() for key in s]
    found = {
        f"state {key} {id(param)}": o.state[param][key]
        for o in it.optimizers
        for param, key in state
        if param in o.state
    }
    found |= {f"rollout.{name} {n}": x for name, y in vars(it.rollout).items() for n, x in enumerate(tensors(y))}
    for name in ("agent", "replay"):
        found |= {f"{name}.{key}": x for key, x in getattr(it, name, torch.nn.Module()).state_dict().items()}
    return {name: x.untyped_storage()._cdata for name, x in found.items()}


def check_steps(module):
    """Run every step of an agent as a GPU would, and hold it to the rules of a capture."""
    _device_constructors()  # `with device` makes its list of them once, and not of the stand-in
    importlib.import_module("torch._dynamo")  # notes what torch.autograd.grad is, once, and not the stand-in
    zeros, pinned = torch.zeros, []

    def noted_zeros(*args, pin_memory=False, **kwargs):
        x = zeros(*args, **kwargs)
        pinned.extend([x] if pin_memory else [])
        assert not (inside and pin_memory), "no pinned memory is allocated in a capture"
        return x

    inside = []
    with ExitStack() as fakes:
        fakes.enter_context(mock.patch.object(torch, "zeros", noted_zeros))
        fakes.enter_context(mock.patch.object(torch.autograd, "grad", gradients_of_nothing))
        # deepcopy, which makes the target networks, would copy the mode as well
        fakes.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        # autocast, which Atari agents use by default, asks whether there is a GPU
        fakes.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        fakes.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda: True))
        fakes.enter_context(FakeTensorMode())
        it = fake_build(module)
        assert pinned and all(x.device.type == "cpu" for x in pinned)
        assert all(any(x is y for y in pinned) for x in it.rollout.host), "what the host touches is pinned"
        module.draw_noise(it.rollout, None)
        for _ in range(2):  # the optimizer's state comes into being outside of a capture
            for step in it.steps.values():
                step()
        for name, step in it.steps.items():
            before, seen = lasting(it), []
            for _ in range(2):
                inside.append(name)
                with CaptureRules(pinned) as rules:
                    step()
                inside.clear()
                seen.append(rules.seen)
            assert rules.count > 5
            assert (torch.bfloat16 in rules.dtypes) == ("atari" in module.__name__), "a GPU's precision by default"
            assert lasting(it) == before, f"{name}: {set(lasting(it).items()) ^ set(before.items())} is another tensor"
            assert seen[0] == seen[1], f"{name}: a graph would freeze a number of the host that changes"
        assert all(isinstance(x, FakeTensor) for x in tensors([*vars(it.rollout).values(), *it.agent.parameters()]))


@pytest.mark.parametrize("module", agents_with("accelerate", "CudaGraph"))
def test_steps_on_a_fake_gpu(module):
    check_steps(module)


def test_the_optimizers_are_those_of_main():
    """What fake_build puts in the place of main's own."""
    for case in agents_with("accelerate", "CudaGraph"):
        source = script(case.values[0].__name__).read_text()
        assert "torch.optim.Adam(" in source and "fused=True, capturable=cuda" in source


# What a hasty edit of agents/ppo.py might be, and what it is caught by.
NEW_OBS = "    rollout.obs[t].copy_(rollout.host_obs, non_blocking=True)\n"
BACK = "    rollout.host_actions.copy_(rollout.actions[t], non_blocking=True)\n"
OPTIMIZE = "    optimizer.step()\n    return norm\n"
SCALE = "    norm = nn.utils.clip_grad_norm_(params, max_grad_norm)\n"
FAULTS = {
    "mixed devices": (NEW_OBS, NEW_OBS + "    rollout.obs[t].add_(torch.ones(len(rollout.obs[t]), 1))\n", "device"),
    "host read": (BACK, BACK + "    rollout.actions[t].max().item()\n", "item|local_scalar_dense"),
    "branch on a tensor": (
        SCALE,
        SCALE + "    if norm > 9:\n        norm = norm + 1\n",
        "local_scalar_dense|bool|item",
    ),
    "unpinned copy": (NEW_OBS, NEW_OBS.replace("rollout.host_obs", "rollout.host_obs.clone()"), "pinned"),
    "blocking copy": (NEW_OBS, NEW_OBS.replace(", non_blocking=True", ""), "wait"),
    "frozen host number": (
        SCALE,
        SCALE + "    optimizer.count = getattr(optimizer, 'count', 0) + 1\n    norm = norm * optimizer.count\n",
        "freeze",
    ),
    "noise inside a capture": (BACK, BACK + "    rollout.gumbel[t].exponential_()\n", "noise"),
    "pinned memory inside": (BACK, BACK + "    torch.zeros(3, pin_memory=True)\n", "pinned memory is allocated"),
    "change of type in a host copy": (
        "self.obs = torch.zeros(T + 1, N, *shape, device=device)",
        "self.obs = torch.zeros(T + 1, N, *shape, device=device, dtype=torch.float64)",
        "as it lies",
    ),
    "another tensor in a tensor's place": (BACK, BACK + "    rollout.gumbel = rollout.gumbel + 1\n", "another tensor"),
}


def edited(tmp_path, old, new):
    """A copy of agents/ppo.py with one passage changed, as a module."""
    source = script("ppo").read_text()
    assert source.count(old) == 1, old
    (tmp_path / "edited_ppo.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited_ppo", tmp_path / "edited_ppo.py")
    module = sys.modules["edited_ppo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, tmp_path):
    old, new, words = FAULTS[fault]
    with pytest.raises(Exception, match=words) as caught:
        check_steps(edited(tmp_path, old, new))
    assert not isinstance(caught.value, (SyntaxError, NameError, AttributeError)), caught.value
