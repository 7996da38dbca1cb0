"""benchmarks/fps.py measures what there is and survives what fails; benchmarks/report.py shows what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT / "benchmarks"))

import fps  # noqa: E402
import report  # noqa: E402

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
    summary = {"env_id": args.env_id, "num_envs": args.num_envs, "device": "cpu", "sps": 1000.0, "sps_rollout": 2000.0,
               "sps_update": 2000.0, "compile_seconds": 0.5, "wall_seconds": 1.0, "global_step": args.total_timesteps}
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


# ---- fps.py ----------------------------------------------------------------------------------------------------------


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
    assert warm["global_step"] == 80 * (1 + 7)  # 0.5 s at 1000 SPS are 7 iterations of 8 x 10 steps, after the first
    assert warm["agent_command"] == (
        "python fake_agent.py --device auto --num-envs 8 --mode eager --total-timesteps 640 --eval-episodes 0"
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


def test_profile_records_one_iteration(agent, results, tmp_path, capsys):
    args = fps.Args(agents=(str(agent),), modes=("eager",), profile=True, profile_dir=tmp_path, results=results)
    assert fps.main(args) == 0 and not results.exists()
    events = json.loads((tmp_path / "fake_agent_eager_4.json").read_text())["traceEvents"]
    assert [event["name"] for event in events].count("aten::mm") == 2  # the second iteration, and no other
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
    monkeypatch.setattr(fps, "find_agents", lambda names: ["a", "b"])
    gpu = fps.configurations(fps.parse_args(["--suite", "gpu"]), gpu=True)
    assert gpu[:4] == [("a", "env-only", 128), ("b", "env-only", 128), ("a", "eager", 128), ("b", "eager", 128)]
    fastest = [num_envs for agent, mode, num_envs in gpu if (agent, mode) == ("b", "compile-cudagraphs")]
    assert sorted(fastest) == [8, 32, 128, 512] and len(gpu) == len(set(gpu)) == 2 * (4 + 4 + 3)
    quick = fps.parse_args(["--suite", "quick", "--repeats", "7"])
    assert quick.repeats == 7 and quick.minutes < 3
    assert [mode for agent, mode, _ in fps.configurations(quick, gpu=False) if agent == "a"] == [
        "env-only", "eager", "compile"]  # fmt: skip


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}\n{"torn'])
def test_append_leaves_other_lines_alone(results, before):
    results.write_text(before)
    fps.append(results, {"b": 2})
    assert results.read_text() == before + ("\n" if before.endswith("torn") else "") + '{"b": 2}\n'


# ---- report.py -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A folder with measurements and a README that waits for its tables."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/results.jsonl").write_bytes((DATA / "fps_results.jsonl").read_bytes())
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_summary_of_runs():
    rows = report.summarise(report.read_results(DATA / "fps_results.jsonl"))
    (compiled,) = (row for row in rows if (row["agent"], row["mode"]) == ("ppo", "compile"))
    assert (compiled["sps"], compiled["low"], compiled["high"], compiled["runs"]) == (40_000, 36_000, 44_000, 3)
    assert (compiled["cold"], compiled["warm"], compiled["eager_sps"], compiled["env_only_sps"]) == (30, 5, 2e4, 5e5)
    # 1/40,000 s a step: 1/80,000 of it in the rollout, of which 1/500,000 in the environments, the rest in the update
    assert report.time_shares(compiled) == pytest.approx((0.08, 0.42, 0.5, 0))


def test_only_the_newest_call_counts():
    """And a comparison is only made within one call."""
    old, new = ({"eager": 10.0, "env-only": 100.0}, {"eager": 20.0})
    base = json.loads((DATA / "fps_results.jsonl").read_text().splitlines()[0])
    records = [base | {"started": day, "mode": mode, "sps": sps}
               for day, runs in (("2026-02-02", new), ("2026-01-01", old)) for mode, sps in runs.items()]  # fmt: skip
    env_only, eager = report.summarise(records)
    assert (eager["sps"], eager["runs"], eager["eager_sps"], eager["env_only_sps"]) == (20, 1, 20, None)
    assert env_only["sps"] == 100


def test_flags_of_the_agents_make_another_configuration():
    base = json.loads((DATA / "fps_results.jsonl").read_text().splitlines()[0])
    rows = report.summarise([base | {"sps": 1.0}, base | {"sps": 2.0, "agent_flags": "--num-steps 16"}])
    assert [(row["agent"], row["sps"]) for row in rows] == [("ppo", 1), ("ppo --num-steps 16", 2)]


def test_tables_are_the_golden_ones():
    rows = report.summarise(report.read_results(DATA / "fps_results.jsonl"))
    page = report.fill(Path("no page yet"), report.PAGE, report.benchmarks_block(rows))
    assert page == (DATA / "fps_report.md").read_bytes()


def test_writes_checks_and_writes_again(project, capsys):
    pytest.importorskip("matplotlib")
    assert report.main(report.Args(check=True, root=project)) == 1
    assert not (project / "benchmarks/README.md").exists()
    assert report.main(report.Args(root=project)) == 0
    text = (project / "README.md").read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "compile-cudagraphs" in text and "old" not in text
    assert (project / "benchmarks/README.md").read_bytes() == (DATA / "fps_report.md").read_bytes()
    written = contents(project)
    pictures = [path for path, content in written.items() if content.startswith(b"\x89PNG")]
    assert {path.name for path in pictures} == set(report.PLOTS)

    assert report.main(report.Args(check=True, root=project)) == 0
    for path in pictures:
        path.unlink()
    assert report.main(report.Args(root=project)) == 0 and contents(project) == written  # the same to the byte
    for change in (project / "README.md", project / "benchmarks/README.md", pictures[0]):
        change.write_bytes(b"\x89PNG" if change in pictures else written[change].replace(b"2026", b"2027"))
        capsys.readouterr()
        assert report.main(report.Args(check=True, root=project)) == 1
        assert str(change) in capsys.readouterr().err
        change.write_bytes(written[change])


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "line 3: is not a record in JSON"),
        ('{"started": "2026', "line 3: is not a record in JSON"),
        ("[1, 2]", "line 3: is not a record in JSON"),
        ('{"mode": "eager"}', "line 3: is a record without started, agent"),
        (None, "no measurements yet"),
        ("missing", "No such file"),
    ],
)
def test_bad_results_change_nothing(project, capsys, line, message):
    results = project / "benchmarks/results.jsonl"
    lines = results.read_text().splitlines()
    results.write_text("" if line is None else "\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    if line == "missing":
        results.unlink()
    before = contents(project)
    for check in (False, True):
        with pytest.raises(SystemExit) as end:
            report.main(report.Args(check=check, root=project))
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert contents(project) == before


@pytest.mark.parametrize("text", [None, "no markers", f"{report.END}\n{report.BEGIN}\n", f"{report.BEGIN}\n"])
def test_readme_without_markers(project, capsys, text):
    (project / "README.md").unlink() if text is None else (project / "README.md").write_text(text)
    before = contents(project)
    with pytest.raises(SystemExit) as end:
        report.main(report.Args(root=project))
    assert end.value.code == 2 and report.BEGIN in capsys.readouterr().err
    assert contents(project) == before


def test_committed_tables_are_what_report_makes():
    readme, results = ROOT / "README.md", ROOT / "benchmarks/results.jsonl"
    if not results.is_file() or not readme.is_file() or report.BEGIN not in readme.read_text():
        pytest.skip("README.md has no tables of speeds yet")
    assert report.main(report.Args(check=True)) == 0
