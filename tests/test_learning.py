"""benchmarks/learning.py: runs that are made once and resumed, their curves and statistics, tables beside others'."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, tiny
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning  # noqa: E402
import report  # noqa: E402

# What learning.py relies on in an agent, in no time and without torch. It notes each call in a file beside itself; on
# Fails-v1 it fails, on Hangs-v1 it waits for SIGTERM, unless it goes on with a run.
FAKE_AGENT = """
import argparse, json, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Args:
    env_id: str = "Fake-v1"
    seed: int = 1
    run_dir: str = None
    resume: str = None
    num_envs: int = 4
    sizes: tuple = (1, 2)

def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    for name, value in asdict(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), default=value, type=int if value in (1, 4) else str)
    return Args(**vars(parser.parse_args(argv)))

def check_args(args):
    return "cpu", "eager"

if __name__ == "__main__":
    args = parse_args()
    folder = Path(args.resume or args.run_dir)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"agent": "fake_agent", "args": asdict(args)}))
    (folder / "fake_agent.py").write_bytes(Path(__file__).read_bytes())
    with open(Path(__file__).with_name("calls"), "a") as calls:
        print(args.env_id, args.seed, "resumed" if args.resume else "begun", file=calls)
    summary = {"agent": "fake_agent", "env_id": args.env_id, "seed": args.seed, "device": "cpu", "mode": "eager",
               "global_step": 40, "wall_seconds": 8.0, "eval_return_mean": 10.0 * args.seed, "stopped_by": None}
    if args.env_id == "Fails-v1":
        sys.exit("error: the loss is not finite any more")
    if args.env_id == "Hangs-v1" and not args.resume:
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append("SIGTERM"))
        Path(__file__).with_name("hangs").touch()
        while not stop:
            time.sleep(0.01)
        summary["stopped_by"] = "SIGTERM"
    (folder / "summary.json").write_text(json.dumps(summary))
    sys.exit(143 if summary["stopped_by"] else 0)
"""


@pytest.fixture
def agent(tmp_path):
    path = tmp_path / "fake_agent.py"
    path.write_text(FAKE_AGENT)
    return path


@pytest.fixture
def project(tmp_path):
    """A folder whose README waits for its tables."""
    (tmp_path / "project/benchmarks").mkdir(parents=True)
    (tmp_path / "project/README.md").write_text(f"before\n{learning.BEGIN}\nold\n{learning.END}\nafter\n")
    return tmp_path / "project"


@pytest.fixture
def results(project):
    (project / "benchmarks/learning").mkdir()
    return project / "benchmarks/learning"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(agent, project, **values):
    work_dir = project.parent / "work"
    return learning.Args(agents=(str(agent),), root=project, work_dir=work_dir, **{"seeds": (1, 2)} | values)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_finished_runs_are_left_out_and_failed_ones_tried_again(agent, project, capsys):
    calls, results = agent.with_name("calls"), project / "benchmarks/learning/fake_agent.jsonl"
    args = arguments(agent, project, env_ids=("Fails-v1", "Fake-v1"), jobs=2, note="a remark")
    assert learning.main(args) == 1
    assert sorted(calls.read_text().splitlines()) == [
        "Fails-v1 1 begun", "Fails-v1 2 begun", "Fake-v1 1 begun", "Fake-v1 2 begun"]  # fmt: skip
    assert "failed: the loss is not finite any more (exit status 1)" in capsys.readouterr().out
    records = {(record["env_id"], record["seed"]): record for record in read_lines(results)}
    failed, done = records["Fails-v1", 1], records["Fake-v1", 2]
    assert failed["failed"] == "the loss is not finite any more (exit status 1)" and "global_step" not in failed
    assert (done["eval_return_mean"], done["args"], done["note"], done["curve"]["global_step"]) == (
        20, {}, "a remark", [])  # fmt: skip
    assert done["command"] == "python agents/fake_agent.py --env-id Fake-v1 --seed 2"
    assert done["cpu"] and done["cores"] >= 1 and done["torch"] is None and done["python"] and done["gpu_count"] >= 0
    assert done["commit"] and done["dirty"] is True  # this file is in no commit

    calls.unlink()
    assert learning.main(args) == 1
    assert sorted(calls.read_text().splitlines()) == ["Fails-v1 1 resumed", "Fails-v1 2 resumed"]
    calls.unlink()
    assert learning.main(arguments(agent, project, seeds=(2, 3), agent_flags="--num-envs 8")) == 0
    assert calls.read_text().splitlines() == ["Fake-v1 2 begun", "Fake-v1 3 begun"]  # other settings, another run
    assert read_lines(results)[-1]["args"] == {"num_envs": 8}
    table = (project / "README.md").read_text()
    assert "fake_agent --num-envs 8" in table and "0 (2 failed)" in table and "old" not in table
    assert (table.startswith("before\n"), table.endswith("after\n")) == (True, True)

    results.unlink()  # removed lines are measured anew
    calls.unlink()
    assert learning.main(arguments(agent, project)) == 0
    assert calls.read_text().splitlines() == ["Fake-v1 1 begun", "Fake-v1 2 begun"]


def test_interrupted_keeps_its_runs_and_goes_on(agent, project):
    command = [sys.executable, ROOT / "benchmarks/learning.py", "--agents", agent, "--env-ids", "Fake-v1", "Hangs-v1"]
    command += ["--seeds", "1", "--root", project, "--work-dir", project.parent / "work"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not agent.with_name("hangs").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    results = project / "benchmarks/learning/fake_agent.jsonl"
    assert [record["env_id"] for record in read_lines(results)] == ["Fake-v1"]
    assert "Fake-v1" in (project / "README.md").read_text()
    (summary,) = (project.parent / "work").glob("Hangs-v1*/summary.json")
    assert json.loads(summary.read_text())["stopped_by"] == "SIGTERM"  # it was asked to end, not killed

    agent.with_name("calls").unlink()
    assert learning.main(arguments(agent, project, env_ids=("Fake-v1", "Hangs-v1"), seeds=(1,))) == 0
    assert agent.with_name("calls").read_text() == "Hangs-v1 1 resumed\n"
    assert [record["env_id"] for record in read_lines(results)] == ["Fake-v1", "Hangs-v1"]


def test_a_run_has_one_process(agent, project):
    """And one that came to its end, though that was not written down, is not made again."""
    (job,) = learning.plan(arguments(agent, project, env_ids=("Hangs-v1",), seeds=(1,)), set())
    job.start([])
    (other,) = learning.plan(arguments(agent, project, env_ids=("Hangs-v1",), seeds=(1,)), set())
    with pytest.raises(BlockingIOError):
        other.start([])
    while not agent.with_name("hangs").exists():
        time.sleep(0.02)
    (refused,) = learning.run_jobs([other], 1)
    assert "another process" in refused["failed"]
    job.process.terminate()
    assert job.process.wait(timeout=60) == 143
    (job.run_dir / "summary.json").write_text((job.run_dir / "summary.json").read_text().replace('"SIGTERM"', "null"))
    (record,) = learning.run_jobs([other], 1)
    assert record["global_step"] == 40 and not job.run_dir.exists()
    assert agent.with_name("calls").read_text() == "Hangs-v1 1 begun\n"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 6})
    assert [learning.share(slot, 2) for slot in range(2)] == [[0, 1], [2, 5, 6]]
    assert learning.share(0, 1) == [] == learning.share(5, 6)


def test_bad_flags_end_before_anything_starts(project):
    args = learning.Args(agents=("ppo",), env_ids=("CartPole-v1", "CartPole-v9"), root=project, work_dir=project)
    before = contents(project)
    with pytest.raises(SystemExit) as end:
        learning.main(args)
    assert end.value.code == 2 and contents(project) == before


def test_a_real_agent(project):
    """From the command line to the table, with a curve from the events of the run."""
    skipped = {"device", "mode", "eval_episodes"}
    flags = tiny("ppo", env_id="CartPole-v1", eval_episodes=2)
    assert learning.main(arguments("ppo", project, seeds=(1,), agent_flags=" ".join(flags))) == 0
    (record,) = read_lines(project / "benchmarks/learning/ppo.jsonl")
    assert record["command"].startswith("python agents/ppo.py --env-id CartPole-v1 --seed 1 --device cpu")
    assert record["args"].keys() >= skipped and record["args"]["num_envs"] == 4
    assert record["global_step"] == 256 and record["total_timesteps"] == 259
    curve = record["curve"]
    assert curve["global_step"][-1] == 256 and len({*map(len, curve.values())}) == 1
    assert 0 < curve["wall_seconds"][-1] < record["wall_seconds"] and min(curve["episodic_return"]) >= 8
    assert (project / "benchmarks/plots/learning_CartPole-v1.png").is_file()
    page = (project / "benchmarks/README.md").read_text()
    assert "490.0 ± 6.12 at 0.5M (CleanRL ppo)" in page and report.BEGIN in page


# ---- curves ----------------------------------------------------------------------------------------------------------


def write_session(path, start, resumed_at, points):
    """An event file as an agent's writer leaves it: points of step, seconds after the start, return."""
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        log = SessionLog(status=SessionLog.START)
        writer.write(Event(wall_time=start, step=resumed_at, session_log=log).SerializeToString())
        for step, seconds, episode_return in points:
            values = {"charts/SPS": 1.0, "losses/entropy": 1.0, "charts/episodic_return": episode_return}
            for tag, value in values.items():
                if value is not None:
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                    writer.write(Event(wall_time=start + seconds, step=step, summary=summary).SerializeToString())


@pytest.fixture
def resumed(agent, tmp_path):
    """The folder of a run whose first session was killed after its checkpoint at step 20, an hour before the next."""
    folder = tmp_path / "run"
    command = [sys.executable, agent, "--run-dir", folder, "--seed", "3", "--num-envs", "16"]
    subprocess.run(command, check=True)
    write_session(folder / "events.out.tfevents.2.b", 5000, 20, [(30, 4, 4.0), (40, 5, None), (50, 6, 6.0)])
    write_session(folder / "events.out.tfevents.10.a", 1000, 0, [(10, 1, 1.0), (20, 2, 2.0), (30, 3, 3.0)])
    with open(folder / "events.out.tfevents.10.a", "ab") as file:
        file.write(b"\x18\0\0\0\0\0\0\0torn")
    return folder


def test_curve_of_a_resumed_run(resumed, monkeypatch):
    """No pause, no stretch that was lost and repeated, and no point where no game ended."""
    expected = {"global_step": [10, 20, 30, 50], "wall_seconds": [1, 2, 6, 8], "episodic_return": [1, 2, 4, 6]}
    assert learning.read_curve(resumed) == expected
    monkeypatch.setattr(learning, "POINTS", 3)
    short = {"global_step": [20, 50], "wall_seconds": [2, 8], "episodic_return": [1.5, 5]}
    assert learning.read_curve(resumed) == short


def test_import(resumed, project, capsys):
    assert learning.main(learning.Args(imports=(resumed,), note="by hand", root=project)) == 0
    (record,) = read_lines(project / "benchmarks/learning/fake_agent.jsonl")
    assert (record["seed"], record["args"], record["note"]) == (3, {"num_envs": 16}, "by hand")
    assert record["command"] == "python agents/fake_agent.py --env-id Fake-v1 --seed 3 --num-envs 16"
    assert record["curve"]["wall_seconds"] == [1, 2, 6, 8] and record["cpu"]
    (resumed / "summary.json").unlink()
    before = contents(project)
    for folder in (resumed, resumed / "none"):
        with pytest.raises(SystemExit):
            learning.main(learning.Args(imports=(folder,), root=project))
        assert str(folder) in capsys.readouterr().err
    assert contents(project) == before


def test_code_is_found_in_the_history(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout

    commits = git("log", "--format=%H", "--", "agents/ppo.py").split()
    if not commits:
        pytest.skip("no history here")
    (tmp_path / "ppo.py").write_text(git("show", f"{commits[-1]}:agents/ppo.py"))
    assert learning.find_code(tmp_path / "ppo.py") == {"commit": commits[-1], "dirty": False}
    (tmp_path / "ppo.py").write_text("another")
    assert learning.find_code(tmp_path / "ppo.py") == {"commit": git("rev-parse", "HEAD").strip(), "dirty": True}


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_interquartile_mean():
    assert learning.iqm(np.array([8, 1, 7, 2, 6, 3, 5, 4])) == 4.5  # of 3, 4, 5, 6
    assert learning.iqm(np.array([0, 100, 1, 3, 2])) == 2  # of 1, 2, 3
    assert learning.iqm(np.array([0, 1, 5])) == 2  # a quarter of three is no whole score
    assert learning.iqm(np.array([[0, 9, 1, 2], [4, 4, 0, 9]])).tolist() == [1.5, 4]


def test_bootstrap_interval():
    """Two runs that score 0 and 1 have samples of mean 0, 1/2, 1/2 and 1; drawing never mixes tasks."""
    runs = np.array([[0.0, 1.0]])
    assert learning.interval(runs).tolist() == [0, 1]
    assert learning.interval(runs, level=0.4).tolist() == [0.5, 0.5]
    tasks = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert learning.interval(tasks).tolist() == [2, 2]
    curves = np.array([[[0.0, 5.0], [1.0, 5.0]]])
    assert learning.interval(curves).T.tolist() == [[0, 1], [5, 5]]


def test_time_to_score():
    curve = {"global_step": [*range(1, 101)], "wall_seconds": [*range(10, 1010, 10)]}
    curve |= {"episodic_return": [0] * 50 + [10] * 50}
    smooth = learning.smooth(curve)["episodic_return"]  # over 5 steps
    assert smooth[49:56].tolist() == [0, 2, 4, 6, 8, 10, 10]
    assert learning.seconds_to(7, curve) == 540 and learning.seconds_to(10, curve) == 550
    assert learning.seconds_to(11, curve) == math.inf == learning.seconds_to(0, {name: [] for name in curve})


def test_curves_meet_where_all_have_points():
    curves = [{"global_step": [100, 300], "wall_seconds": [1, 3], "episodic_return": [0, 2]},
              {"global_step": [200, 400], "wall_seconds": [5, 9], "episodic_return": [10, 14]}]  # fmt: skip
    places, returns = learning.align(curves, "global_step")
    assert (places[0], places[-1], returns[:, 0].tolist(), returns[:, -1].tolist()) == (200, 300, [1, 10], [2, 12])


# ---- tables and files ------------------------------------------------------------------------------------------------


def record(seed, evaluation, trained, wall, **changes):
    """A record of a run whose return rises in a line to what it ends with."""
    curve = {"global_step": [*range(100, 2100, 100)], "wall_seconds": [wall / 20 * i for i in range(1, 21)],
             "episodic_return": [trained * i / 20 for i in range(1, 21)]}  # fmt: skip
    values = {"agent": "ppo", "env_id": "Pong-v5", "seed": seed, "args": {}, "device": "cpu", "gpu": None}
    values |= {"gpu_power_limit_watts": None, "cpu": "AMD EPYC 7763 64-Core Processor", "cores": 2, "mode": "eager"}
    values |= {"commit": "0123456789", "dirty": False, "date": "2026-01-02T00:00:00+00:00", "stopped_by": None}
    values |= {"global_step": 2000, "eval_return_mean": evaluation, "train_return_mean": trained}
    values |= {"wall_seconds": wall, "curve": curve}
    return values | changes


PUBLISHED = {
    "figures": [
        {"agent": "ppo", "env_id": "PongNoFrameskip-v4", "steps": 10_000_000, "mean": 20.36, "std": 0.2, "source": "A"},
        {"agent": "ppo", "env_id": "Breakout-v5", "steps": 1, "mean": 1, "std": 0, "source": "B"},
        {"agent": "dqn", "env_id": "Pong-v5", "steps": 1, "mean": 1, "std": 0, "source": "C"},
    ],
    "scores": [{"env_id": "Pong-v4", "score": 10, "source": "D"}],
}


def test_table():
    records = [record(seed, seed, 5.0 * seed, 100) for seed in (5, 4, 3, 2)]
    records += [record(1, 99, 99, 99), record(1, 1, 5, 200, commit="abcdefabcdef", dirty=True)]  # the later one counts
    records += [record(6, 0, 0, 0, failed="died")]
    gpu = {"device": "cuda:0", "gpu": "NVIDIA H200", "gpu_power_limit_watts": 700}
    records += [record(1, None, 5, 10, args={"anneal_lr": False}, stopped_by="SIGTERM", **gpu)]
    lines = learning.table(learning.summarise(records, PUBLISHED), full=True).splitlines()
    on_gpu, on_cpu = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert on_gpu == [
        "Pong-v5", "ppo --no-anneal-lr", "2,000 (1 stopped)", "1", "–", "5.00 ± 0.00", "20.36 ± 0.20 at 10M (A)",
        "10.0 s", "– to 10 (0 of 1 seeds)", "NVIDIA H200 700 W + AMD EPYC 7763, 2 cores, eager", "–",
        "2026-01-02 0123456",
    ]  # fmt: skip
    low, high = learning.interval(np.array([[1.0, 2, 3, 4, 5]]))
    assert on_cpu == [
        "Pong-v5", "ppo", "2,000", "5 (1 failed)", f"3.00 ({low:.2f} to {high:.2f})", "15.00 ± 7.07",
        "20.36 ± 0.20 at 10M (A)", "100.0 s",
        "70.0 s to 10 (4 of 5 seeds)",  # seed s scores s / 4 more every 5 s: 10 after 100, 70, 50 and 40 s, or never
        "AMD EPYC 7763, 2 cores, eager", "1: 1.00, 2: 2.00, 3: 3.00, 4: 4.00, 5: 5.00, 6: failed",
        "2026-01-02 0123456, 2026-01-02 abcdefa+",
    ]  # fmt: skip


@pytest.mark.parametrize("env_id", ["Pong-v5", "PongNoFrameskip-v4", "Pong-v4"])
def test_published_figures_are_found_by_name(env_id):
    (row,) = learning.summarise([record(1, 1, 1, 1, env_id=env_id)], PUBLISHED)
    assert [figure["source"] for figure in row["published"]] == ["A"] and row["score"] == 10


def test_published_json():
    published = json.loads(learning.PUBLISHED.read_text())
    keys = [(figure["agent"], figure["env_id"], figure["source"]) for figure in published["figures"]]
    assert len(keys) == len({*keys}) and all(figure["steps"] >= 500_000 for figure in published["figures"])
    names = [learning.base_name(score["env_id"]) for score in published["scores"]]
    assert len(names) == len({*names}) and all(
        entry["source"] for part in ("figures", "scores") for entry in published[part]
    )


def test_writes_checks_and_writes_again(project, results, capsys):
    lines = [json.dumps(record(seed, seed, seed, 100)) for seed in (1, 2, 3)]
    (results / "ppo.jsonl").write_text("\n".join(lines) + "\n")
    assert learning.main(learning.Args(check=True, root=project)) == 1
    assert not (project / "benchmarks/README.md").exists()
    assert learning.main(learning.Args(root=project)) == 0
    written = contents(project)
    pictures = [path for path, content in written.items() if content.startswith(b"\x89PNG")]
    assert pictures == ["benchmarks/plots/learning_Pong-v5.png"]
    assert learning.main(learning.Args(check=True, root=project)) == 0
    shutil.rmtree(project / "benchmarks/plots")
    assert learning.main(learning.Args(root=project)) == 0 and contents(project) == written  # the same to the byte
    (results / "ppo.jsonl").write_text("\n".join(lines[:2]) + "\n")
    capsys.readouterr()
    assert learning.main(learning.Args(check=True, root=project)) == 1
    err = capsys.readouterr().err
    assert all(
        name in err for name in ("README.md", "benchmarks/README.md", pictures[0], "python benchmarks/learning.py")
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"agent": "ppo', "line 2: is not a record in JSON"),
        ("[]", "line 2: is not a record in JSON"),
        ('{"agent": "ppo"}', "line 2: is a record without args, cores"),
        (None, "no results yet"),
    ],
)
def test_bad_results_change_nothing(project, results, capsys, line, message):
    if line:
        (results / "ppo.jsonl").write_text(f"{json.dumps(record(1, 1, 1, 1))}\n{line}\n")
    before = contents(project)
    with pytest.raises(SystemExit) as end:
        learning.main(learning.Args(root=project))
    assert end.value.code == 2 and message in capsys.readouterr().err and contents(project) == before


def test_committed_tables_are_what_learning_makes():
    assert learning.main(learning.Args(check=True)) == 0
