"""Eager, compiled and captured: the same functions, so the same weights.

Whole runs of `main` are compared, so nothing here depends on what an agent's steps are made of. Learning rate, epsilon
and noise change from one iteration to the next: what a mode froze at its first call would show.
"""

import functools
import inspect
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ALIKE, NAMES, agent_named, has_compiler, read_checkpoint, settings, slow_unless_new, tiny
from emulation import Graph, Recording, emulated_graphs

TWINS = {"c51", "ddpg_continuous_action", "rpo_continuous_action", "sac_atari"}  # others run their kind of step
ITERATIONS = 5  # two as they are, one recorded and replayed, two replayed
QUICK = ["ppo"]  # agents whose compiled mode takes no --slow; others are traced without it
each_agent = pytest.mark.parametrize("agent", NAMES)
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")


def arguments(agent, mode, device="cpu"):
    """Settings for some iterations at a small learning rate: at a large one rounding errors grow without bounds."""
    module = agent_named(agent)
    rates = settings(agent) & {"learning_rate", "q_lr", "policy_lr"}
    changes = dict.fromkeys(rates, 1e-4)
    small = {"precision": "fp32", "frame_skip": 4, "num_steps": 8}
    changes |= {name: value for name, value in small.items() if name in settings(agent)}
    changes |= {"learning_starts": 64, "total_timesteps": 64 + 16 * 4} if "buffer_size" in settings(agent) else {}
    args = module.parse_args(tiny(agent, eval_episodes=0, device=device, **changes))
    if "num_steps" in settings(agent):
        args.total_timesteps = ITERATIONS * args.num_envs * args.num_steps
    args.mode = mode  # the command line refuses graphs without a GPU
    if device != "cpu":  # torch 2.11 would keep TF32 there: https://github.com/pytorch/pytorch/issues/179445
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    return args


def without_a_gpu(module):
    """Within it, an agent's Args take CUDA graphs on a CPU."""
    check = module.Args.__post_init__

    def post_init(args):
        mode, args.mode = args.mode, "eager"
        check(args)
        args.mode = mode

    return mock.patch.object(module.Args, "__post_init__", post_init)


class Seen(Exception):
    """Ends `main` once accelerate has been called."""


def steps_of(agent, args):
    """What accelerate was given, by name, and what it returned."""
    module, seen = agent_named(agent), []

    def accelerate(*inputs):
        bound = inspect.signature(real).bind(*inputs)
        seen.append((bound.arguments, real(*inputs)))
        raise Seen

    real = module.accelerate
    with mock.patch.object(module, "accelerate", accelerate), pytest.raises(Seen):
        module.main(args)
    return seen[0]


@functools.cache
def trained(agent, mode, device="cpu"):
    """The networks before and after a run in a mode, and its last checkpoint.

    The mode "emulated" is cudagraphs on a CPU; "traced" is compile without its last stage, which takes most of the
    time: the code of the kernels.
    """
    module, networks, save = agent_named(agent), [], torch.save
    args = arguments(agent, {"emulated": "cudagraphs", "traced": "compile"}.get(mode, mode), device)
    traced = mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    around = {"emulated": emulated_graphs(), "traced": traced}.get(mode, nullcontext())

    def note(state, file):
        networks.append({name: x.cpu().clone() for name, x in state["agent"].items()})
        return save(state, file)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with tempfile.TemporaryDirectory() as folder, around, mock.patch.object(torch, "save", note), without_a_gpu(module):
        args.run_dir, graphs = f"{folder}/run", Graph.recorded
        module.main(args)
        assert Graph.recorded > graphs + 1 or mode != "emulated"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] or args.mode != "compile", "nothing was compiled"
        return networks[0], networks[-1], read_checkpoint(Path(args.run_dir))


def distances(agent, mode, device="cpu"):
    """How far the weights moved in eager mode, and how far from there the other mode ended."""
    start, expected, reference = trained(agent, "eager", device)
    same_start, reached, checkpoint = trained(agent, mode, device)
    assert all(torch.equal(start[name], same_start[name]) for name in start)
    assert checkpoint["returns"] == reference["returns"] and checkpoint["global_step"] == reference["global_step"]
    for name, x in expected.items():
        torch.testing.assert_close(reached[name], x, rtol=1e-3, atol=1e-4)
    flat = [torch.cat([network[name].double().flatten() for name in start]) for network in (start, expected, reached)]
    return (flat[1] - flat[0]).norm().item(), (flat[2] - flat[1]).norm().item()


@pytest.mark.parametrize("agent", slow_unless_new(TWINS))
def test_graphs_give_the_same_weights(agent):
    """Recorded and replayed are the very operations of eager mode: the same bits, whatever changes outside.

    And that is not for want of learning: every parameter moves.
    """
    moved, apart = distances(agent, "emulated")
    assert moved > 0 and apart == 0
    start, end, _ = trained(agent, "eager")
    fixed = {"low", "high", "atoms"} | {name for name in start if name.startswith("target.")}  # RND's
    assert {name for name in start if torch.equal(start[name], end[name])} <= fixed


@pytest.mark.parametrize("agent", slow_unless_new(ALIKE - {"ppo_atari", "dqn_atari", "pqn"}))
def test_traced_functions_give_the_same_weights(agent):
    """What torch.compile makes of the functions, before it writes kernels, computes the same."""
    moved, apart = distances(agent, "traced")
    assert apart < 1e-2 * moved


@needs_compiler
@pytest.mark.parametrize("agent", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in NAMES])
def test_compiled_functions_give_the_same_weights(agent):
    moved, apart = distances(agent, "compile")
    assert apart < 1e-2 * moved


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "cudagraphs", "compile-cudagraphs"])
@each_agent
def test_modes_of_a_gpu_give_the_same_weights(agent, mode):
    moved, apart = distances(agent, mode, "cuda")
    assert apart < 1e-2 * moved


def test_a_recording_notices_what_a_graph_could_not_hold():
    """Reads by the host, noise drawn inside, what was computed outside and a graph within another."""
    one = torch.tensor(1)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Recording(Graph()):
        torch.arange(3)[one]
    with pytest.raises(AssertionError, match="noise"), Recording(Graph()):
        torch.rand(3)
    with pytest.raises(AssertionError, match="nothing was recorded"):
        Graph().replay()
    total, graph = torch.zeros(()), Graph()
    with Recording(graph):
        twice = 2 * total.add_(one)
    assert total == 0 and twice.isnan(), "recording is not running"
    for count in range(1, 4):
        graph.replay()
        assert total == count and twice == 2 * count


@pytest.mark.gpu
@each_agent
def test_replays_neither_allocate_nor_sync(agent):
    given, (acts, learn) = steps_of(agent, arguments(agent, "compile-cudagraphs", "cuda"))
    rollout, generator = given["rollout"], torch.Generator("cuda").manual_seed(1)

    def iterate():
        agent_named(agent).draw_noise(rollout, generator)
        for act in acts:
            act()
            event = torch.cuda.Event()
            event.record()
            event.synchronize()  # the one wait
        learn()

    for _ in range(4):
        iterate()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert rollout.host_obs.is_pinned() and rollout.host_actions.is_pinned()
