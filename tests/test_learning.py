"""benchmarks/learning.py: runs that are made once and resumed, and their curves."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import contents, tiny
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning  # noqa: E402
import results as results_file  # noqa: E402

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
    device: str = "auto"
    mode: str = "auto"
    num_envs: int = 4
    sizes: tuple = (1, 2)

def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    for name, value in asdict(Args()).items():
        parser.add_argument("--" + name.replace("_", "-"), default=value, type=int if value in (1, 4) else str)
    return Args(**vars(parser.parse_args(argv)))

class UserError(Exception):
    pass

def make_envs(args, num_envs, seed):
    if args.env_id == "None-v1":
        raise UserError("--env-id None-v1: no such environment")

def check_envs(args, envs):
    pass

if __name__ == "__main__":
    args = parse_args()
    folder = Path(args.resume or args.run_dir)
    folder.mkdir(exist_ok=True)
    (folder / ".lock").touch()
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
def agent(tmp_path, request):
    """The file of the fake agent, or the name of another one."""
    if getattr(request, "param", "fake") != "fake":
        return request.param
    path = tmp_path / "fake_agent.py"
    path.write_text(FAKE_AGENT)
    return path


@pytest.fixture
def results(tmp_path):
    return tmp_path / "learning"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(agent, results, **values):
    work_dir = results.parent / "work"
    return learning.Args(agents=(str(agent),), results=results, work_dir=work_dir, **{"seeds": (1, 2)} | values)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_finished_runs_are_left_out_and_failed_ones_tried_again(agent, results, capsys):
    calls, lines = agent.with_name("calls"), results / "fake_agent.jsonl"
    args = arguments(agent, results, env_ids=("Fails-v1", "Fake-v1"), jobs=2, note="a remark")
    assert learning.main(args) == 1
    assert sorted(calls.read_text().splitlines()) == [
        "Fails-v1 1 begun", "Fails-v1 2 begun", "Fake-v1 1 begun", "Fake-v1 2 begun"]  # fmt: skip
    assert "failed: the loss is not finite any more (exit status 1)" in capsys.readouterr().out
    records = {(record["env_id"], record["seed"]): record for record in read_lines(lines)}
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
    assert learning.main(arguments(agent, results, seeds=(2, 3), agent_flags="--num-envs 8")) == 0
    assert calls.read_text().splitlines() == ["Fake-v1 2 begun", "Fake-v1 3 begun"]  # other settings, another run
    assert read_lines(lines)[-1]["args"] == {"num_envs": 8}

    lines.unlink()  # removed lines are measured anew
    calls.unlink()
    assert learning.main(arguments(agent, results)) == 0
    assert calls.read_text().splitlines() == ["Fake-v1 1 begun", "Fake-v1 2 begun"]


def test_interrupted_keeps_its_runs_and_goes_on(agent, results):
    command = [sys.executable, ROOT / "benchmarks/learning.py", "--agents", agent, "--env-ids", "Fake-v1", "Hangs-v1"]
    command += ["--seeds", "1", "--results", results, "--work-dir", results.parent / "work"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not agent.with_name("hangs").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    lines = results / "fake_agent.jsonl"
    assert [record["env_id"] for record in read_lines(lines)] == ["Fake-v1"]
    (summary,) = (results.parent / "work").glob("Hangs-v1*/summary.json")
    assert json.loads(summary.read_text())["stopped_by"] == "SIGTERM"  # it was asked to end, not killed

    agent.with_name("calls").unlink()
    assert learning.main(arguments(agent, results, env_ids=("Fake-v1", "Hangs-v1"), seeds=(1,))) == 0
    assert agent.with_name("calls").read_text() == "Hangs-v1 1 resumed\n"
    assert [record["env_id"] for record in read_lines(lines)] == ["Fake-v1", "Hangs-v1"]


def test_a_run_has_one_process(agent, results):
    """And one that came to its end, though that was not written down, is not made again."""
    (job,) = learning.plan(arguments(agent, results, env_ids=("Hangs-v1",), seeds=(1,)), set())
    job.start([])
    (other,) = learning.plan(arguments(agent, results, env_ids=("Hangs-v1",), seeds=(1,)), set())
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


@pytest.mark.parametrize("agent", ["fake", "ppo"], indirect=True)
def test_bad_flags_end_before_anything_starts(agent, results, tmp_path, capsys):
    good = "Fake-v1" if "fake" in str(agent) else "CartPole-v1"
    before = contents(tmp_path)
    for values in ({"env_ids": (good, "None-v1")}, {"agent_flags": "--nonsense"}, {"jobs": 0}, {"agents": ()}):
        with pytest.raises(SystemExit) as end:
            learning.main(replace(arguments(agent, results, env_ids=(good,)), **values))
        assert end.value.code == 2 and capsys.readouterr().err and contents(tmp_path) == before


def test_a_real_agent(results):
    """From the command line to the table, with a curve from the events of the run."""
    flags = tiny("ppo", env_id="CartPole-v1", eval_episodes=2)
    args = arguments("ppo", results, seeds=(1,), agent_flags=" ".join(flags))
    assert learning.main(args) == 0
    (record,) = read_lines(results / "ppo.jsonl")
    assert record["command"].startswith("python agents/ppo.py --env-id CartPole-v1 --seed 1 --device cpu")
    assert record["args"].keys() >= {"device", "mode", "eval_episodes"} and record["args"]["num_envs"] == 4
    assert record["global_step"] == 256 and record["total_timesteps"] == 259 and record["mode"] == "eager"
    curve = record["curve"]
    assert curve["global_step"][-1] == 256 and len({*map(len, curve.values())}) == 1
    assert 0 < curve["wall_seconds"][-1] < record["wall_seconds"] and min(curve["episodic_return"]) >= 8
    (row,) = results_file.summarise_learning(results_file.read_learning(results), [])
    assert row["score"] == record["eval_return_mean"]
    assert learning.plan(args, {learning.identity(record)}) == [], "the record is of the run that was planned"


# ---- curves ----------------------------------------------------------------------------------------------------------


def write_session(path, start, global_step, points):
    """An event file as an agent's writer leaves it that begins at a step: points of step, seconds after, return."""
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        log = SessionLog(status=SessionLog.START)
        writer.write(Event(wall_time=start, step=global_step + 1, session_log=log).SerializeToString())
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


def test_import(resumed, results, tmp_path, capsys):
    assert learning.main(learning.Args(imports=(resumed,), note="by hand", results=results)) == 0
    (record,) = read_lines(results / "fake_agent.jsonl")
    assert (record["seed"], record["args"], record["note"]) == (3, {"num_envs": 16}, "by hand")
    assert record["command"] == "python agents/fake_agent.py --env-id Fake-v1 --seed 3 --num-envs 16"
    assert record["curve"]["wall_seconds"] == [1, 2, 6, 8] and record["cpu"]
    (resumed / "summary.json").unlink()
    before = contents(tmp_path)
    for folder in (resumed, resumed / "none"):
        with pytest.raises(SystemExit):
            learning.main(learning.Args(imports=(folder,), results=results))
        assert str(folder) in capsys.readouterr().err
    assert contents(tmp_path) == before


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


def test_time_to_score():
    curve = {"global_step": [*range(1, 101)], "wall_seconds": [*range(10, 1010, 10)]}
    curve |= {"episodic_return": [0] * 50 + [10] * 50}  # 0, 2, 4, ... 10 from step 50 on, smoothed over 5 steps
    assert learning.seconds_to(7, curve) == 540 and learning.seconds_to(10, curve) == 550
    assert learning.seconds_to(11, curve) == math.inf == learning.seconds_to(0, {name: [] for name in curve})


def test_committed_results_can_be_read():
    records = results_file.read_learning(ROOT / "benchmarks/learning")
    assert len({learning.identity(record) for record in records}) > 50
