"""benchmarks/fps.py measures what there is, goes on where it ended, and survives what fails; so does gpu_session.sh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fps  # noqa: E402

# What fps.py relies on in an agent, in no time and without torch: "compile" fails, "cudagraphs" hangs. The profiler,
# which imports torch, makes it multiply as many matrices in an iteration as the iteration's number says.
FAKE_AGENT = """
import argparse, json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from tqdm import tqdm

def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    for flag in ("--device", "--mode", "--run-dir"):
        parser.add_argument(flag, default="auto")
    for flag in ("--num-envs", "--total-timesteps", "--eval-episodes"):
        parser.add_argument(flag, type=int, default=4)
    args = parser.parse_args(argv)
    args.env_id, args.seed, args.num_steps, args.frame_skip = "Fake-v5", 1, 10, 4
    return args

def make_envs(args, num_envs, seed):
    space = SimpleNamespace(sample=lambda: 1)
    return SimpleNamespace(single_action_space=space, reset=lambda: None, step=lambda actions: time.sleep(0.001))

if __name__ == "__main__":
    args = parse_args()
    if args.mode == "compile":
        print("before", "error: --mode compile: no compiler here", "after", sep="\\n", file=sys.stderr)
        sys.exit(2)
    if args.mode == "cudagraphs":
        Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(60)
    if torch := sys.modules.get("torch"):
        bar = tqdm(total=args.total_timesteps)
        for iteration in range(1, 1 + args.total_timesteps // (10 * args.num_envs)):
            tqdm(disable=True).update()  # as the compiler's
            for _ in range(iteration):
                torch.mm(torch.ones(2, 2), torch.ones(2, 2))
            bar.update(10 * args.num_envs)
    summary = {"env_id": args.env_id, "num_envs": args.num_envs, "device": os.environ.get("FAKE_DEVICE", "cpu")}
    summary |= {"sps": 1000.0, "sps_rollout": 2000.0, "sps_update": 2000.0, "compile_seconds": 0.5}
    summary |= {"wall_seconds": 1.0, "global_step": args.total_timesteps}
    print(json.dumps(summary))
    sys.exit(0)
"""


@pytest.fixture
def agent(tmp_path):
    path = tmp_path / "fake_agent.py"
    path.write_text(FAKE_AGENT)
    return path


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.jsonl"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_takes_turns_and_goes_on_after_a_failure(agent, results, capsys):
    modes = ("compile", "eager")
    args = fps.Args(agents=(str(agent),), modes=modes, num_envs=(8,), repeats=2, seconds=0.5, results=results)
    assert fps.main(args) == 1
    records = read_lines(results)
    assert [record["mode"] for record in records] == ["env-only", "compile", "eager", "env-only", "eager"]
    for record in records:
        assert (record["agent"], record["env_id"], record["frame_skip"], record["num_envs"]) == (
            "fake_agent", "Fake-v5", 4, 8)  # fmt: skip
        assert record["dirty"] is True  # this agent is in no commit
        assert record["torch"] and record["envpool"] and record["cpu"] and record["cores"] >= 1
        assert record["command"].startswith("python benchmarks/fps.py") and record["date"] >= record["started"]
        assert {"commit", "dirty", "gpu", "gpu_count", "gpu_power_limit_watts", "driver"} <= record.keys()
    env_only, compiled, cold, _, warm = records
    assert compiled["failed"] == "--mode compile: no compiler here (exit status 2)" and "sps" not in compiled
    assert 0 < env_only["sps"] < 8 * 1000 and "cache" not in env_only  # a step of all 8 takes over 1 ms
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    assert 1 < warm["host_memory_mib"] < 1000
    assert warm["global_step"] == 80 * (3 + 7)  # 0.5 s at 1000 SPS are 7 iterations of 8 x 10 steps, after three
    assert warm["agent_command"] == (
        "python fake_agent.py --device auto --num-envs 8 --mode eager --total-timesteps 800 --eval-episodes 0"
    )
    assert capsys.readouterr().out.count("failed: --mode compile: no compiler here") == 2  # at once, and at the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_keeps_what_it_measured(agent, results, number):
    command = [sys.executable, ROOT / "benchmarks/fps.py", "--agents", agent, "--modes", "eager", "cudagraphs"]
    command += ["--seconds", "0.1", "--results", results]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background has none
    )  # fmt: skip
    pid = agent.with_suffix(".pid")
    while process.poll() is None and not (pid.is_file() and pid.read_text()):
        time.sleep(0.05)  # until the mode that hangs is running
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [record["mode"] for record in read_lines(results)] == ["env-only", "eager"]
    assert "2 runs" in out and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_time_limit_ends_a_run_that_hangs(agent, results, capsys):
    args = fps.Args(agents=(str(agent),), modes=("cudagraphs",), seconds=0.1, minutes=0.06, results=results)
    assert fps.main(args) == 0
    assert {record["mode"] for record in read_lines(results)} <= {"env-only"}
    assert "the time is up" in capsys.readouterr().err


@pytest.mark.slow
def test_profile_records_one_iteration(agent, results, tmp_path, capsys):
    args = fps.Args(agents=(str(agent),), modes=("eager",), profile=True, profile_dir=tmp_path, results=results)
    assert fps.main(args) == 0 and not results.exists()
    events = json.loads((tmp_path / "fake_agent_eager_4.json").read_text())["traceEvents"]
    assert [event["name"] for event in events].count("aten::mm") == 4  # the fourth iteration, and no other
    assert "aten::mm" in (tmp_path / "fake_agent_eager_4.txt").read_text()
    assert "aten::mm" in capsys.readouterr().out


def test_a_real_agent(results):
    args = fps.Args(agents=("ppo",), modes=("eager",), num_envs=(4,), device="cpu", repeats=1, seconds=0.1,
                    agent_flags="--num-steps 16 --env-id Acrobot-v1", results=results)  # fmt: skip
    assert fps.main(args) == 0
    env_only, eager = read_lines(results)
    for record in (env_only, eager):
        assert (record["env_id"], record["num_envs"], record["frame_skip"]) == ("Acrobot-v1", 4, 1)
        assert record["agent_flags"] == "--num-steps 16"
        assert record["host_memory_mib"] > 100 and record["device_memory_mib"] is None
    assert eager["sps"] < min(eager["sps_rollout"], eager["sps_update"], env_only["sps"])


def test_every_agent_file_is_found():
    assert [path.stem for path in fps.find_agents(())] == sorted(path.stem for path in (ROOT / "agents").glob("*.py"))
    with pytest.raises(SystemExit):
        fps.find_agents(["pp"])


def test_suites(monkeypatch):
    names = ["a", "sac_continuous_action", "ppo_atari"]
    monkeypatch.setattr(fps, "find_agents", lambda _: [Path(name) for name in names])
    gpu = [(agent.name, *others) for agent, *others in fps.configurations(fps.parse_args(["--suite", "gpu"]), gpu=True)]
    first, fastest = names[:0:-1], "compile-cudagraphs"
    assert gpu[:4] == [(name, mode, 8) for mode in ("env-only", fastest) for name in first]
    assert gpu[12:14] == [(name, "eager", 8) for name in first]  # after all sizes of the fastest mode
    assert gpu[14:] == [("a", mode, n) for n in (8, 64, 256) for mode in ("env-only", fastest)] + [("a", "eager", 8)]
    quick = fps.parse_args(["--suite", "quick", "--repeats", "7"])
    assert quick.repeats == 7 and quick.minutes < 3 and quick.agents == fps.FIRST
    modes = [mode for agent, mode, _ in fps.configurations(quick, gpu=False) if agent.name == "a"]
    assert modes == ["env-only", "eager", "compile"]


@pytest.mark.parametrize("starts, steps", [(1000, 1184), (0, 2024)])
def test_the_first_run_is_as_long_as_a_guess_says(starts, steps, tmp_path, monkeypatch):
    """Two seconds at a fiftieth of the environments' speed where an agent learns from replay, else at a quarter."""
    taken = []
    monkeypatch.setattr(fps, "run", lambda *words, **_: taken.extend(words) or {"sps": 1})
    known = {"sps": 4000.0, "iteration_steps": 8, "learning_starts": starts, "num_envs": 8}
    fps.measure(fps.Args(seconds=2), fps.ROOT / "agents/sac_continuous_action.py", "eager", 8, known, None, tmp_path, 9)
    assert taken[taken.index("--total-timesteps") + 1] == str(steps)


@pytest.fixture
def gpu_suite(agent, results, tmp_path, monkeypatch):
    """gpu_suite(**changes) measures the fake agent as the gpu suite does, and returns the lines that this adds."""
    monkeypatch.setattr(fps, "describe_gpu", lambda: {"gpu": "G1", "gpu_count": 1, "gpu_power_limit_watts": 1.0})
    monkeypatch.setenv("REDLINE_COMMIT", "abc")
    monkeypatch.setenv("FAKE_DEVICE", "cuda:0")

    def measure(**changes):
        before = len(read_lines(results)) if results.exists() else 0
        flags = ["--suite", "gpu", "--repeats", "1", "--seconds", "0.1", "--results", str(results)]
        args = fps.parse_args([*flags, "--agents", str(agent), "--cache", str(tmp_path / "cache")])
        fps.main(fps.replace(args, **changes))
        return [(line["mode"], line["num_envs"], line.get("cache")) for line in read_lines(results)[before:]]

    return measure


@pytest.mark.slow
def test_gpu_suite_goes_on_where_it_ended(agent, results, gpu_suite, monkeypatch):
    measured = gpu_suite()
    fastest = "compile-cudagraphs"
    assert [line[:2] for line in measured if line[0] != "env-only"] == [(fastest, 8), (fastest, 64), (fastest, 256),
                                                                       ("eager", 8)]  # fmt: skip
    assert [cache for mode, _, cache in measured if mode == fastest] == ["cold", "shared", "shared"]
    assert gpu_suite() == []
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:1] + lines[2:]) + "\n")  # without compile-cudagraphs at 8
    (again,) = gpu_suite()
    assert again == (fastest, 8, "warm")
    assert len({line["started"] for line in read_lines(results)}) == 1, "the report compares within one session only"
    assert len(gpu_suite(repeats=2)) == 7
    assert len(gpu_suite(agent_flags="--env-id Other-v1")) == 7  # another configuration
    agent.write_text(agent.read_text() + "\n# changed")
    assert len(gpu_suite()) == 7
    monkeypatch.setattr(fps, "describe_gpu", lambda: {"gpu": "G2", "gpu_count": 1, "gpu_power_limit_watts": 1.0})
    assert len(gpu_suite()) == 7


def test_what_failed_in_the_gpu_suite_is_not_tried_again(gpu_suite):
    (env_only, failed) = gpu_suite(modes=("compile",), num_envs=(8,))
    assert failed[0] == "compile" and gpu_suite(modes=("compile",), num_envs=(8,)) == []


def test_a_run_that_hangs_is_a_failure_and_the_others_go_on(agent, results, monkeypatch, capsys):
    monkeypatch.setattr(fps, "LIMIT", 3)
    modes = ("cudagraphs", "eager")  # the first of them sleeps for a minute
    args = fps.Args(agents=(str(agent),), modes=modes, num_envs=(8,), repeats=1, seconds=0.1, results=results)
    assert fps.main(args) == 1
    _, hung, eager = read_lines(results)
    assert hung["failed"] == "no end within 4 s" and "sps" not in hung and eager["sps"] == 1000


def test_speeds_of_a_cpu_are_none_of_a_gpu(results, gpu_suite, monkeypatch):
    """A session goes on with its own runs alone."""
    chosen = {"modes": ("eager",), "num_envs": (8,)}
    monkeypatch.setenv("FAKE_DEVICE", "cpu")
    assert len(gpu_suite(**chosen, device="cpu")) == 2
    monkeypatch.setenv("FAKE_DEVICE", "cuda:0")
    assert len(gpu_suite(**chosen)) == 2 and gpu_suite(**chosen) == gpu_suite(**chosen, device="cuda:0") == []


def test_rehearsal_takes_the_order_of_the_suite(agent, results, capsys):
    before = fps.RESULTS.read_bytes()
    args = fps.parse_args(["--suite", "gpu", "--rehearse", "--agents", str(agent)])
    assert fps.main(args) == 0 and fps.RESULTS.read_bytes() == before
    lines = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("fake_agent")]
    fastest = [[mode, str(n)] for n in (4, 8, 12) for mode in ("env-only", "compile-cudagraphs")]
    assert lines == [*fastest, ["eager", "4"]]  # "compile" fails in this agent, so eager ran in its place
    assert fps.main(fps.replace(args, results=results)) == 0
    assert {line["device"] for line in read_lines(results)} == {"cpu"}


def test_replay_agents_start_to_learn_early(agent, results):
    text = agent.read_text().replace('"--eval-episodes"', '"--eval-episodes", "--learning-starts"')
    agent.write_text(text.replace("args.frame_skip = ", "args.frame_skip, args.learning_starts = ").replace(
        '"Fake-v5", 1, 10, 4', '"Fake-v5", 1, 10, 4, 5000'))  # fmt: skip
    args = fps.Args(agents=(str(agent),), modes=("eager",), num_envs=(8,), repeats=1, seconds=0.001, results=results)
    assert fps.main(args) == 0
    command = read_lines(results)[-1]["agent_command"]
    assert "--learning-starts 1000 " in command and "--total-timesteps 1440 " in command  # 80 x (13 + 3 + 2)


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}\n{"torn'])
def test_append_leaves_other_lines_alone(results, before):
    results.write_text(before)
    fps.append(results, {"b": 2})
    assert results.read_text() == before + ("\n" if before.endswith("torn") else "") + '{"b": 2}\n'


@pytest.mark.slow
def test_gpu_session_can_be_rehearsed(tmp_path):
    """All steps in tiny runs on a CPU, without git."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "git").write_text("#!/bin/sh\nexit 127\n")
    (hidden / "git").chmod(0o755)
    env = os.environ | {"PYTHON": sys.executable, "PATH": f"{hidden}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "benchmarks/gpu_session.sh", "--rehearse"]
    out = tmp_path / "out"
    done = subprocess.run([*command, out], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split() for line in (out / "steps.txt").read_text().splitlines()]
    names = ("envs", "eager", "suite", "pong", "pong", "pong", "sac", "combo", "tests")
    assert [(name, status) for name, status, *_ in steps] == [(name, "ok") for name in names]
    records = read_lines(out / "results.jsonl")
    assert {("Breakout-v5", "env-only"), ("Breakout-v5", "eager"), ("Pong-v5", "compile-cudagraphs")} <= {
        (record["env_id"], record["mode"]) for record in records}  # fmt: skip
    (pong,) = read_lines(out / "learning/ppo_atari.jsonl")
    assert pong["env_id"] == "Pong-v5" and pong["global_step"] > 0
    assert "aten::" in (out / "session.txt").read_text() and len([*out.iterdir()]) <= 8
    bad = subprocess.run([*command, tmp_path / "bad", "nonsense"], env=env, capture_output=True, text=True)
    assert bad.returncode == 2 and "nonsense" in bad.stderr
