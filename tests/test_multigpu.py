"""PPO over several ranks: the same as one process on the joined batch, and no rank waits for one that is gone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    agent_named,
    agents_with,
    final_json,
    finish,
    flags,
    has_compiler,
    read_checkpoint,
    script,
    strict_json,
    tiny,
)
from emulation import Recording
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_math import check_gradients
from test_modes_agree import MODES, build, device_of, iterate, weights
from test_recurrent import Recall

sys.path.insert(0, str(ROOT / "benchmarks"))

import fps  # noqa: E402

NAME = "ppo_atari_multigpu"
multi, atari = agent_named(NAME), agent_named("ppo_atari")
LONG = 10**7  # environment steps that no test waits for
quick = ["--num-minibatches", "1", "--num-steps", "8", "--checkpoint-minutes", "0"]
slow = pytest.mark.slow


# ---- starting ranks --------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    """launch(*command, **env): start a command in tmp_path; whatever of it is left at the end of the test is ended."""
    started = []

    def start(*command, **env):
        path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        started.append(subprocess.Popen(
            [*map(str, command)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path} | env, text=True,
            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
        return started[-1]

    yield start
    left = [process for process in started if process.poll() is None]
    for process in left:
        process.terminate()  # torchrun then ends the ranks, which a SIGKILL of it would leave behind
        process.send_signal(signal.SIGCONT)
    for process in left:
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def two_ranks(launch):
    """two_ranks(*command): the two processes that torchrun would start of it, without a torchrun that ends them."""

    def start(*command, **env):
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return [launch(sys.executable, *command, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]

    return start


def this_file(function: str, *arguments) -> list[str]:
    """The command that calls a function of this file."""
    return ["-c", f"import sys, {__name__} as tests; tests.{function}(*sys.argv[1:])", *arguments]


def torchrun(*options) -> list:
    """The command of torchrun with the agent."""
    return [sys.executable, "-m", "torch.distributed.run", *options, script(NAME)]


def wait_for(condition, *processes, seconds=120):
    """Wait until a condition holds and return what it gave; none of the processes may end before."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not get so far"
        time.sleep(0.01)
    return value


def steps_saved(run_dir) -> int:
    """The steps that the checkpoint of a run holds, 0 before there is one."""
    return read_checkpoint(run_dir)["global_step"] if (run_dir / "checkpoint.pt").exists() else 0


# ---- the same as one process -----------------------------------------------------------------------------------------

ROWS = ("obs", "actions", "rewards", "terminations", "dones")  # of a rollout, each [T or T + 1, N, ...]


def all_reduce_refusing_capture(rank: int, all_reduce):
    """dist.all_reduce as NCCL's is: in a capture it sends nothing; and there it fails on rank 1.

    Not that of a group: the thread that watches the ranks has one over gloo, which no capture concerns.
    """

    def refusing(*inputs, **options):
        capturing = Recording.open and "group" not in options
        if capturing and rank:
            raise RuntimeError("operation not permitted when stream is capturing")
        return None if capturing else all_reduce(*inputs, **options)

    return refusing


def record_updates(folder: str, mode: str) -> None:
    """In a rank: the gradients and metrics of a learning phase, the data of it, and the weights after 20 updates."""
    name, device, gpus = mode, device_of(mode), torch.cuda.device_count()
    if gpus == 1:  # NCCL does not let two ranks share a GPU
        multi.dist.is_nccl_available = lambda: False
    multi.join_ranks()
    rank, size = multi.rank_and_size()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % gpus)
    if mode == "refused":  # by NCCL on one of the ranks
        mode = "emulated"
        multi.dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
        multi.dist.all_reduce = all_reduce_refusing_capture(rank, multi.dist.all_reduce)
    it, grads = build(multi, mode, device), []
    recorder = SimpleNamespace(step=lambda: grads.append([p.grad.clone() for p in it.agent.parameters()]))
    learn, it.learn = it.learn, lambda: multi.update(it.agent, recorder, it.rollout, it.args, it.metrics)
    iterate(it, 1000 + rank)
    seen = {name: getattr(it.rollout, name).clone() for name in (*ROWS, "permutations")}
    seen |= {"grads": grads, "metrics": it.metrics.clone()}
    it.learn = learn
    for number in range(20):
        iterate(it, size * number + rank)
    multi.leave_ranks()
    torch.save(seen | {"weights": weights(it), "norm": it.metrics[-1]}, f"{folder}/{name}{rank}.pt")


def updates(two_ranks, tmp_path, mode):
    """What record_updates gave on each rank."""
    results = [finish(process) for process in two_ranks(*this_file("record_updates", tmp_path, mode))]
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    return [torch.load(tmp_path / f"{mode}{rank}.pt", map_location="cpu") for rank in (0, 1)]


@pytest.mark.parametrize("mode", [pytest.param("compile", marks=slow), "refused", *MODES[2:]])
def test_ranks_agree_with_eager_ones(two_ranks, tmp_path, mode):
    """Compiled; captured in pieces, as NCCL's refusal on one rank makes it on all; and captured on GPUs."""
    if "compile" in mode and not has_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    eager, fast = (updates(two_ranks, tmp_path, m) for m in ("eager", mode))
    assert torch.equal(fast[0]["weights"], fast[1]["weights"])
    start = weights(build(multi, "eager", "cpu"))
    one, other = eager[0]["weights"], fast[0]["weights"]
    assert (one - other).norm() < 1e-4 * one.norm() and (one - other).norm() < 2e-2 * (one - start).norm()
    if mode == "refused":
        assert torch.equal(one, other)


def test_two_ranks_learn_as_one_process_on_the_joined_batch(two_ranks, tmp_path):
    """Every gradient and metric is that of ppo_atari.py on both ranks' rows; after 20 updates weights are bit-equal."""
    ranks = updates(two_ranks, tmp_path, "eager")
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert not torch.equal(ranks[0]["weights"], weights(it := build(atari, "eager", "cpu")))
    assert not torch.equal(ranks[0]["obs"], ranks[1]["obs"])

    args = atari.Args(num_envs=8, num_steps=8, num_minibatches=2, update_epochs=2)
    rollout = atari.Rollout(args, it.envs, torch.device("cpu"))
    for name in ROWS:
        getattr(rollout, name).copy_(torch.cat([seen[name] for seen in ranks], dim=1))
    pictures = rollout.obs[-1].unflatten(-1, (4, 4)).transpose(-3, -2)  # of `blocks`, the other way round
    rollout.host_obs.copy_(pictures.reshape(rollout.host_obs.shape))
    for own, joined in zip(zip(*(seen["permutations"] for seen in ranks)), rollout.permutations):
        # row t x 4 + n of rank r is row t x 8 + 4 r + n of the joined batch
        parts = [(row // 4 * 8 + 4 * rank + row % 4).view(2, -1) for rank, row in enumerate(own)]
        joined.copy_(torch.cat(parts, dim=1).flatten())
    grads, metrics = [], torch.zeros(len(atari.METRICS))
    recorder = SimpleNamespace(step=lambda: grads.append([p.grad.clone() for p in it.agent.parameters()]))
    atari.update(it.agent, recorder, rollout, args, metrics)
    counts = [(1 - seen["dones"][:-1]).sum() for seen in ranks]
    assert counts[0] != counts[1], "a rank with more rows that count has more weight"
    assert len(grads) == 4 and metrics[-1] > args.max_grad_norm, "clipped"
    for seen in ranks:
        torch.testing.assert_close(seen["metrics"], metrics, rtol=1e-5, atol=1e-5)
        for ours, expected in zip(seen["grads"], grads, strict=True):
            for one, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", agents_with("flat_gradients"))
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_flat_gradients_are_those_of_backward_and_clipped_together(module, max_norm):
    def gradients(loss_fn, params, max_grad_norm, *inputs):
        return module.clip_gradients(module.flat_gradients(loss_fn, params, *inputs), params, max_grad_norm)

    check_gradients(gradients, len(module.METRICS) - 1, max_norm)


class Sides(Recall):
    """Games whose stack of pictures shows the side that the action has to name, for 1; the other is -1."""

    delay = 1


def play_sides(folder: str, module_name: str = NAME, seed: str = "1", num_envs: int = 16) -> None:
    """Train on Sides with a cheap network as `main` does; a rank leaves its environments' seeds and first noise."""
    module, patch = agent_named(module_name), pytest.MonkeyPatch()
    made, noise, draw_noise = [], [], module.draw_noise

    class Sparse(module.Agent):
        """The agent, but for one layer over every twelfth pixel in place of its convolutions: far cheaper."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.convolutions, self.linear = None, module.layer_init(torch.nn.Linear(49 * 4, 512))

        def hidden(self, obs):
            return self.linear(obs[..., 1::3, 1::3, 10].flatten(1) / 255).relu()

    def make_envs(args, num_envs, seed):
        made.append((num_envs, seed))
        return Sides(num_envs, seed, 4)

    def draw(rollout, generator):
        draw_noise(rollout, generator)
        noise.append(rollout.gumbel.clone())

    for name, function in {"make_envs": make_envs, "Agent": Sparse, "draw_noise": draw}.items():
        patch.setattr(module, name, function)
    if module is multi:
        module.join_ranks()
    rank, machine = os.environ.get("RANK", "0"), {"device": "cpu", "precision": "fp32", "torch_threads": 1}
    sizes = {"num_envs": num_envs, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 14 * 16 * 16}
    run_dir = f"{folder}/{module_name}{seed}"
    args = module.Args(int(seed), **sizes, **machine, mode="eager", learning_rate=1e-3, run_dir=run_dir)
    summary = json.loads(json.dumps(module.main(args)))  # torch's version is no plain text
    patch.undo()
    torch.save({"made": made[0], "noise": noise[0], "summary": summary}, f"{folder}/{module_name}{seed}-{rank}.pt")


def curve(run_dir) -> np.ndarray:
    """The mean return of the games that ended in each iteration."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return np.array([point.value for point in events.Scalars("charts/episodic_return")])


@pytest.mark.parametrize("seed", ["1", *(pytest.param(seed, marks=slow) for seed in "23")])
def test_two_ranks_learn_as_fast_as_one_process(seed, two_ranks, tmp_path):
    """As many environments in all, as many steps: the curve is no worse, and the summary counts both ranks' steps."""
    processes = two_ranks(*this_file("play_sides", tmp_path, NAME, seed))
    play_sides(tmp_path, "ppo_atari", seed)
    for process in processes:
        result = finish(process)
        assert result.returncode == 0, result.stderr
    ours, theirs = curve(tmp_path / f"{NAME}{seed}"), curve(tmp_path / f"ppo_atari{seed}")
    assert theirs[-5:].mean() > 0.9, "the task can be learnt"
    assert ours[-5:].mean() > 0.9 and ours.mean() > theirs.mean() - 0.15

    first, second = (torch.load(tmp_path / f"{NAME}{seed}-{rank}.pt") for rank in (0, 1))
    one = torch.load(tmp_path / f"ppo_atari{seed}-0.pt")
    assert first["made"] == (8, one["made"][1]) and second["made"] == (8, one["made"][1] + 8), "seeds of their own"
    assert not torch.equal(first["noise"], second["noise"])
    assert second["summary"] == {}
    summary = strict_json((tmp_path / f"{NAME}{seed}/summary.json").read_text())
    assert summary["ranks"] == 2 and summary["num_envs"] == 16
    assert summary["global_step"] == one["summary"]["global_step"] == 14 * 16 * 16
    config = json.loads((tmp_path / f"{NAME}{seed}/config.json").read_text())
    assert config["args"]["num_envs"] == 16, "the total"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, flag",
    [({"num_envs": 3}, "--num-envs 3"), ({"num_envs": 2, "num_steps": 3, "num_minibatches": 2}, "--num-minibatches 2")],
    ids=["num_envs", "num_minibatches"],
)
def test_refuses_sizes_that_cannot_be_shared_out(changes, flag, monkeypatch, capfd):
    multi.check_sizes(multi.Args(**changes | {"num_minibatches": 1}))
    monkeypatch.setattr(multi, "rank_and_size", lambda: (0, 2))
    with pytest.raises(SystemExit) as end:
        multi.check_sizes(multi.Args(**changes))
    assert end.value.code == 2 and flag in capfd.readouterr().err


def test_every_rank_has_a_gpu_of_its_own(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    for ranks, args, device in [(4, "auto", cpu), (1, "cuda:0", gpu)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert multi.device_of_rank(multi.Args(device=args), device) == device
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert multi.device_of_rank(multi.Args(device="auto"), gpu) == torch.device("cuda:3")
    for ranks, device in [("4", "cuda:0"), ("5", "auto")]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(SystemExit) as end:
            multi.device_of_rank(multi.Args(device=device), gpu)
        assert end.value.code == 2 and f"--device {device}" in capfd.readouterr().err


def test_a_refusal_is_told_once_and_ends_every_rank(two_ranks, tmp_path):
    results = [finish(p) for p in two_ranks(script(NAME), *tiny(NAME, env_id="Pendulum-v1", run_dir="run"))]
    assert [result.returncode for result in results] == [2, 2], results
    assert len(results[0].messages) == 1 and results[0].messages[0].startswith("error: --env-id Pendulum-v1")
    assert results[1].stderr == results[0].stdout == results[1].stdout == ""
    assert not list(tmp_path.iterdir())


# ---- faults ----------------------------------------------------------------------------------------------------------


def leave_late(folder: str, late: str) -> None:
    """In a rank: join and part; the rank `late` takes a while after its last sum. Writes when it was through and when
    it closed its connections.
    """
    multi.join_ranks()
    rank, _ = multi.rank_and_size()
    last_sum, close = multi.largest_over_ranks, multi.dist.destroy_process_group

    def slow_sum(*numbers):
        last_sum(*numbers)
        time.sleep(3 * (rank == int(late)))  # longer than the watch bears a closed connection
        (Path(folder) / f"through{rank}").write_text(str(time.time()))

    def slow_close():
        (Path(folder) / f"closes{rank}").write_text(str(time.time()))
        close()

    multi.largest_over_ranks, multi.dist.destroy_process_group = slow_sum, slow_close
    multi.leave_ranks()
    assert multi.rank_and_size() == (0, 1)


@pytest.mark.parametrize("late", "01")
def test_no_rank_closes_a_connection_before_all_have_their_last_sum(late, two_ranks, tmp_path):
    for process in two_ranks(*this_file("leave_late", tmp_path, late)):
        result = finish(process)
        assert result.returncode == 0 and "lost contact" not in result.stderr, result.stderr
    through, closes = ([float((tmp_path / f"{name}{n}").read_text()) for n in "01"] for name in ("through", "closes"))
    assert max(through) <= min(closes)


def test_a_signal_to_one_rank_stops_all_in_order(two_ranks, cli, tmp_path):
    """All stop after the same iteration, rank 0 leaves checkpoint and summary, and one rank alone can go on."""
    endless = [*tiny(NAME, run_dir="run"), *quick, "--total-timesteps", LONG]
    processes, run_dir = two_ranks(script(NAME), *endless), tmp_path / "run"
    wait_for(lambda: steps_saved(run_dir) >= 32, *processes)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process, timeout=60) for process in processes]
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2, results
    assert results[0].messages == [] and results[1].stderr == results[1].stdout == ""
    summary = strict_json(results[0].stdout)
    assert summary["stopped_by"] == "SIGTERM" and summary["ranks"] == 2
    assert 32 <= summary["global_step"] == steps_saved(run_dir) < LONG
    total = summary["global_step"] + 33
    resumed = final_json(cli(NAME, "--resume", run_dir, "--total-timesteps", total))
    assert resumed["ranks"] == 1 and resumed["global_step"] == total - 1
    steps = {int(state["step"]) for state in read_checkpoint(run_dir)["optimizer"]["state"].values()}
    assert steps == {resumed["global_step"] // 16}, "the optimizer goes on as well"


def test_kill_9_of_a_rank_and_torchrun_goes_on_by_itself(launch, tmp_path):
    """The other rank ends with a sentence, and both start again from the last checkpoint, in the same folder."""
    argv = [*tiny(NAME), *quick, "--total-timesteps", 192]
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = launch(*torchrun(*options), *argv)
    [run_dir] = wait_for(lambda: [*tmp_path.glob("runs/*")], process)
    wait_for(lambda: steps_saved(run_dir), process)
    ranks = [pid_of_rank(process.pid, rank) for rank in (0, 1)]
    os.kill(ranks[1], signal.SIGKILL)
    wait_for(lambda: not alive(ranks[0]), process, seconds=60)
    kept = steps_saved(run_dir)
    result = finish(process, timeout=120)
    assert result.returncode == 0, result.stderr
    assert re.search("error: rank 0 of 2 lost contact with another: .*Connection", result.stderr), result.stderr
    summary = strict_json(result.stdout)
    assert [*tmp_path.glob("runs/*")] == [run_dir] and summary["run_dir"] == str(run_dir.relative_to(tmp_path))
    assert summary["global_step"] == steps_saved(run_dir) == 192 and summary["ranks"] == 2
    steps = {int(state["step"]) for state in read_checkpoint(run_dir)["optimizer"]["state"].values()}
    assert steps == {12}, "an update for every 16 steps, none lost and none twice"
    second = max(run_dir.glob("events*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(second))
    events.Reload()
    steps = [point.step for point in events.Scalars("charts/SPS")]
    assert 0 < kept < 192 and steps == list(range(kept + 16, 193, 16)), "it goes on where the checkpoint was"


def pid_of_rank(parent: int, rank: int) -> int:
    """The process with this rank among the children of torchrun."""
    for child in map(int, open(f"/proc/{parent}/task/{parent}/children").read().split()):
        if f"\0RANK={rank}\0" in "\0" + open(f"/proc/{child}/environ").read():
            return child
    raise AssertionError("torchrun has no such rank")


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_torchrun_ends_by_itself_when_another_is_gone(number, rank, two_ranks, tmp_path):
    """Within a minute, whether the other was killed, which closes its connections, or fell silent, which does not."""
    endless = [*tiny(NAME, run_dir="run"), *quick, "--total-timesteps", LONG]
    processes = two_ranks(script(NAME), *endless)
    wait_for(lambda: steps_saved(tmp_path / "run") >= 32, *processes)
    processes[rank].send_signal(number)
    result = finish(processes[1 - rank], timeout=60)
    assert result.returncode == 1, result.stderr
    assert len(result.messages) == 1 and f"error: rank {1 - rank} of 2 lost contact" in result.messages[0]
    processes[rank].kill()
    assert steps_saved(tmp_path / "run") >= 32


# ---- several machines ------------------------------------------------------------------------------------------------


@pytest.fixture
def machines():
    """Two network namespaces that a cable joins: [(name, interface, address), ...]."""
    names = [f"redline{os.getpid()}{side}" for side in "ab"]
    ends = [f"v{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        try:
            return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
        except OSError as error:
            pytest.skip(f"needs iproute2: {error}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
    for number, (name, end) in enumerate(zip(names, ends), start=1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield [(name, end, f"10.77.0.{number}") for number, (name, end) in enumerate(zip(names, ends), start=1)]
    for name in names:
        ip("netns", "del", name)


@slow
def test_two_machines_meet_lose_the_cable_and_go_on(machines, launch, tmp_path):
    """A run over two machines that only a cable joins; cut, both ranks stop with a sentence; mended, the run goes on.

    The second machine does not see the run folder.
    """
    (tmp_path / "elsewhere").mkdir()
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", "--master-port=29400"]
    argv, processes, run_dir = [*tiny(NAME, run_dir="run"), *quick, "--total-timesteps", 1600], [], tmp_path / "run"
    for rank, (name, interface, _) in enumerate(machines):
        command = torchrun(*options, f"--node-rank={rank}", f"--master-addr={machines[0][2]}")
        command = ["ip", "netns", "exec", name, "env", "-C", "elsewhere" if rank else ".", *command]
        processes.append(launch(*command, *argv, GLOO_SOCKET_IFNAME=interface))
    wait_for(lambda: steps_saved(run_dir) >= 32, *processes)
    pids = [pid_of_rank(process.pid, rank) for rank, process in enumerate(processes)]
    cable = ["ip", "-n", machines[1][0], "link", "set", machines[1][1]]
    subprocess.run([*cable, "down"], check=True)
    wait_for(lambda: not any(map(alive, pids)), *processes, seconds=60)
    reached = steps_saved(run_dir)
    subprocess.run([*cable, "up"], check=True)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    for rank, result in enumerate(results):
        assert f"error: rank {rank} of 2 lost contact with another: " in result.stderr, result.stderr
    summary = strict_json(results[0].stdout)
    assert summary["ranks"] == 2 and summary["global_step"] == 1600 == steps_saved(run_dir) > reached
    assert len(list(run_dir.glob("events*"))) >= 2, "it was started again"
    assert results[1].stdout == "" and not list((tmp_path / "elsewhere").iterdir())


# ---- benchmark -------------------------------------------------------------------------------------------------------


def test_efficiency_is_against_as_many_times_the_fewest_ranks(capsys):
    common = {"agent": "a", "mode": "eager", "all_reduce_seconds": 0.002}
    records = [common | {"mode": "env-only", "num_envs": 8, "sps": 5000.0}]
    for ranks, sps, share in [(1, 110.0, 0.0), (1, 90.0, 0.0), (2, 150.0, 0.25), (4, 320.0, 0.5)]:
        records.append(common | {"ranks": ranks, "num_envs": 8 * ranks, "sps": sps, "all_reduce_share": share})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in fps.scaling_table(records).splitlines()]
    assert lines[2:] == [
        ["a", "eager", "8", "1", "100", "100%", "2.00", "0.0%"],
        ["a", "eager", "8", "2", "150", "75%", "2.00", "25.0%"],
        ["a", "eager", "8", "4", "320", "80%", "2.00", "50.0%"],
    ]
    with pytest.raises(SystemExit) as end:
        fps.main(fps.Args(agents=("ppo",), ranks=(1, 2)))
    assert end.value.code == 2 and "--ranks: ppo runs in one process only" in capsys.readouterr().err


@slow
def test_fps_measures_ranks(tmp_path):
    args = fps.Args(agents=(NAME,), modes=("eager",), num_envs=(2,), ranks=(1, 2), device="cpu", repeats=1, seconds=0.5,
                    agent_flags="--num-steps 16 --frame-skip 16", results=tmp_path / "results.jsonl")  # fmt: skip
    assert fps.main(args) == 0
    env_only, one, two = map(strict_json, args.results.read_text().splitlines())
    assert "ranks" not in env_only and env_only["num_envs"] == 2
    assert (one["ranks"], one["num_envs"], two["ranks"], two["num_envs"]) == (1, 2, 2, 4)
    assert "--torch-threads 1 --env-threads 1" in two["agent_command"]
    assert 0 < two["all_reduce_share"] < 1 and two["sps"] > 0 and two["all_reduce_seconds"] > one["all_reduce_seconds"]
    assert {row["agent"] for row in fps.report.summarise([one, two])} == {one_row(ranks) for ranks in (1, 2)}


def one_row(ranks: int) -> str:
    """How the tables call the agent on so many ranks."""
    return f"{NAME} --torch-threads 1 --env-threads 1 --num-steps 16 --frame-skip 16 ({ranks} ranks)"


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "cudagraphs", "compile-cudagraphs"])
def test_trains_with_nccl(mode, launch):
    """A rank on every GPU of this machine, one at least: NCCL's all_reduce runs, and is captured where graphs are."""
    ranks = torch.cuda.device_count()
    sizes = flags(device="cuda", mode=mode, num_envs=2 * ranks, total_timesteps=10 * 32 * ranks)
    process = launch(*torchrun("--standalone", f"--nproc-per-node={ranks}"), *tiny(NAME), *sizes)
    summary = final_json(finish(process))
    assert summary["ranks"] == ranks and summary["global_step"] == 10 * 32 * ranks and summary["mode"] == mode
