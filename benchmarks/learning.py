"""What the agents learn: many seeds on many environments, their scores and curves.

    python benchmarks/learning.py --agents ppo --env-ids CartPole-v1 Acrobot-v1 --jobs 2     # five seeds of each
    python benchmarks/learning.py --agents ppo --agent-flags="--num-envs 8 --num-steps 128"
    python benchmarks/learning.py --import runs/pong                # a run made by hand, however often it was resumed

Every run goes through the agent's command line and ends up as one line of JSON in benchmarks/learning/AGENT.jsonl: its
settings, code, machine, final score and curve. What was measured is kept when this is interrupted; started again, it
leaves out what is finished, goes on with what is not, and tries again what failed. A run is the same as another if
agent, environment, seed, settings, kind of device and the commit of the agent's file are: a new version is measured
anew, and the lines of the old one stay. If there are two lines for the same run, the later one counts.
benchmarks/report.py makes tables and curves of them.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated

import fps
import numpy as np
import tyro
from fps import ROOT
from results import fail, read_learning, smooth
from tqdm import tqdm

CURVE = ("global_step", "wall_seconds", "episodic_return")
POINTS = 200  # of a curve, at most
SUMMARY = ("device", "mode", "torch", "num_envs", "global_step", "train_return_mean", "eval_return_mean",
           "eval_return_std", "eval_episodes", "eval_returns", "sps", "compile_seconds", "wall_seconds",
           "stopped_by")  # fmt: skip
BESIDE = {"seed", "env_id", "run_dir", "resume", "evaluate", "checkpoint_minutes", "video", "track"}  # no settings


@dataclass
class Args:
    agents: tuple[str, ...] = ()
    """names of agents in agents/, or paths of agent files anywhere"""
    env_ids: tuple[str, ...] = ()
    """environments, every agent on each; none takes each agent's own"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds, every one on each environment"""
    agent_flags: str = ""
    """further flags for every agent, in one string after a "=": --agent-flags="--num-envs 64 --mode compile" """
    jobs: int = 1
    """runs at the same time; each keeps to its own share of the cores, if there are enough"""
    imports: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """folders of runs made by hand on this machine, to be added to the results"""
    note: str = ""
    """a remark that is kept with every run added"""
    work_dir: Path = ROOT / "runs/learning"
    """folder for the runs; those that are finished get the time behind their names"""
    results: Path = ROOT / "benchmarks/learning"
    """folder of the results"""


# ---- one run ---------------------------------------------------------------------------------------------------------


def read_curve(run_dir: Path) -> dict[str, list]:
    """A run's curve from its event files: at most POINTS points, each the mean return of a stretch that ends there.

    Seconds count from the first event of the run, without the time between the sessions of a resumed one, and without
    what a killed session did after its last checkpoint: the next one starts from there and repeats it.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    sessions = [[*LegacyEventFileLoader(str(path)).Load()] for path in run_dir.glob("events.out.tfevents.*")]
    points = []  # step, seconds, and the return if any game ended
    for events in sorted(filter(None, sessions), key=lambda events: events[0].wall_time):
        first_step = max((event.step for event in events if event.HasField("session_log")), default=0)
        points = [point for point in points if point[0] < first_step]
        offset = (points[-1][1] if points else 0.0) - events[0].wall_time
        for event in events:
            values = {value.tag: value.simple_value for value in event.summary.value}
            if {"charts/SPS", "charts/episodic_return"} & values.keys():
                points.append((event.step, offset + event.wall_time, values.get("charts/episodic_return")))
    points = [point for point in points if point[2] is not None]
    size = math.ceil(len(points) / POINTS) or 1
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    columns = zip(*((s[-1][0], round(s[-1][1], 2), float(f"{np.mean([p[2] for p in s]):.6g}")) for s in stretches))
    return dict(zip(CURVE, map(list, columns))) or {name: [] for name in CURVE}


def changed_settings(agent: ModuleType, args: dict) -> dict:
    """The settings of a run that differ from the agent's defaults, less those that no curve depends on."""
    args, defaults = (json.loads(json.dumps(values)) for values in (args, asdict(agent.Args())))
    return {name: args[name] for name in sorted(args.keys() - BESIDE) if args[name] != defaults.get(name)}


def flags(settings: dict) -> list[str]:
    """Command line flags of settings: {"num_envs": 8, "anneal_lr": False} -> --num-envs 8 --no-anneal-lr."""
    argv = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def find_code(script: Path) -> dict:
    """The first commit that has this agent's file; HEAD and dirty if none has, dirty None outside a checkout."""
    head, blob = fps.git("rev-parse", "HEAD"), fps.git("hash-object", script.absolute())
    if not head or not blob:
        return {"commit": fps.describe_code()["commit"], "dirty": None}
    # commits that brought or removed the file, newest first; -m because a merge can bring one that no parent has
    known = (fps.git("log", "-m", "--format=%H", "--find-object", blob, "--", f"agents/{script.name}") or "").split()
    return {"commit": known[-1] if known else head, "dirty": not known}


def identity(record: dict) -> tuple:
    """What makes two runs the same: agent, environment, seed, code, kind of device, and settings."""
    device = record["gpu"] or "cuda" if record["device"].startswith("cuda") else "cpu"
    settings = {name: value for name, value in record["args"].items() if name != "device"}
    names = ("agent", "env_id", "seed", "commit", "dirty")
    return *(record[name] for name in names), device, json.dumps(settings, sort_keys=True)


def read_run(run_dir: Path) -> dict:
    """The record of a run that has ended: its settings, code and scores, and its curve."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        summary = json.loads((run_dir / "summary.json").read_text())
        script = run_dir / f"{config['agent']}.py"
        settings = changed_settings(fps.load_agent(script), config["args"])
        record = {name: summary[name] for name in ("agent", "env_id", "seed")} | {"args": settings}
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; a run that has not ended can go on with --resume")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir}: is not the folder of a run ({error})")
    argv = ["python", f"agents/{script.name}", "--env-id", record["env_id"], "--seed", str(record["seed"])]
    date = datetime.fromtimestamp((run_dir / "summary.json").stat().st_mtime, UTC).isoformat(timespec="seconds")
    record |= {"command": shlex.join(argv + flags(settings)), "date": date} | find_code(script)
    record |= {name: summary.get(name) for name in SUMMARY}
    return record | {"total_timesteps": config["args"].get("total_timesteps"), "curve": read_curve(run_dir)}


def describe_machine() -> dict:
    """The processor, how many cores this process may use of it, the GPU, and the versions of what runs on them."""
    versions = {name: value for name, value in fps.describe_code().items() if name not in ("commit", "dirty")}
    return fps.describe_cpu() | fps.describe_gpu() | versions


# ---- many runs -------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A run that is to be made; `about` is what its record starts with, whatever comes of it."""

    script: Path
    argv: list[str]
    run_dir: Path
    about: dict
    process: subprocess.Popen | None = None
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.run_dir.with_name(self.run_dir.name + ".log")

    def start(self, cores: list[int]) -> None:
        """Begin the run or go on with it, as a process on these cores; there is none if it had come to its end.

        Raises BlockingIOError if another process has it in hand.
        """
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        begun = (self.run_dir / "config.json").is_file()
        if self.run_dir.exists() and not begun:
            shutil.rmtree(self.run_dir)  # ended before it began
        command = [sys.executable, self.script, *self.argv, "--resume" if begun else "--run-dir", self.run_dir]
        with open(self.log, "ab") as log, keep_to(cores):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by the process, for as long as it has the log open
            self.log_start = log.tell()
            self.about |= describe_machine()
            if self.is_finished():
                return
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)

    def is_finished(self) -> bool:
        """Whether the run came to its end, though no one wrote that down."""
        try:
            return json.loads((self.run_dir / "summary.json").read_text())["stopped_by"] is None
        except (OSError, ValueError, KeyError):
            return False

    def result(self) -> dict:
        """The record of the run, which has ended; "failed" has the reason if it has failed."""
        if code := self.process.returncode if self.process else 0:
            said = self.log.read_bytes()[self.log_start :].decode(errors="replace")
            now = {"date": fps.now()} | find_code(self.script)
            return self.about | now | {"failed": fps.reason(said, code)}
        record = self.about | read_run(self.run_dir)
        now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # two runs alike may end within a second
        self.run_dir.rename(self.run_dir.with_name(f"{self.run_dir.name}__{now}"))
        return record


@contextmanager
def keep_to(cores: list[int]):
    """While it lasts, processes that are started run on these cores only; with none, on all."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def share(slot: int, jobs: int) -> list[int]:
    """The cores of one of `jobs` runs at the same time; none in particular if there are fewer cores than runs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    fair = 1 < jobs <= len(cores)
    return cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] if fair else []


def plan(args: Args, finished: set) -> list[Job]:
    """The runs that are not finished, seed by seed; ends with a sentence about the first flag that cannot be meant."""
    jobs, gpu = [], fps.describe_gpu()["gpu"]
    agents = [(script, fps.load_agent(script), find_code(script)) for script in fps.find_agents(args.agents)]
    for seed in args.seeds:
        for script, agent, code in agents:
            for env_id in args.env_ids or (agent.Args().env_id,):
                argv = ["--env-id", env_id, "--seed", str(seed), *shlex.split(args.agent_flags)]
                try:
                    settings = agent.parse_args(argv)
                    if seed == args.seeds[0]:
                        agent.check_envs(settings, agent.make_envs(settings, 1, seed))
                except agent.UserError as error:
                    fail(str(error))
                about = {"agent": script.stem, "env_id": env_id, "seed": seed, "gpu": gpu, "mode": settings.mode}
                about |= {"device": "cuda" if gpu and settings.device != "cpu" else "cpu"}
                about |= {"args": changed_settings(agent, asdict(settings))} | code
                about |= {"note": args.note} if args.note else {}
                digest = hashlib.sha256(repr(identity(about)).encode()).hexdigest()[:8]
                run_dir = args.work_dir.absolute() / f"{env_id}__{script.stem}__{seed}__{digest}"
                if identity(about) not in finished:
                    jobs.append(Job(script, argv, run_dir, about))
    return jobs


def run_jobs(jobs: list[Job], width: int):
    """Make the runs, `width` at a time; yields the record of each as it ends. When closed, ends them with a checkpoint.

    A run that another process has in hand is left out.
    """
    waiting, running = jobs[::-1], {}
    try:
        while waiting or running:
            for slot in range(width):
                if waiting and slot not in running:
                    job = waiting.pop()
                    try:
                        job.start(share(slot, width))
                        running[slot] = job
                    except BlockingIOError:
                        yield job.about | {"failed": "another process has this run in hand", "date": None}
            for slot, job in [*running.items()]:
                if job.process is None or job.process.poll() is not None:
                    del running[slot]
                    yield job.result()
            time.sleep(0.05)
    finally:
        processes = [job.process for job in running.values() if job.process]
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=60)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def table_line(*cells) -> str:
    """A line of the table that grows while training; numbers to one decimal, "-" for what is not there."""
    cells = ["-" if cell is None else f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return "{:<26} {:<22} {:>5} {:>12} {:>12} {:>12} {:>10}".format(*cells)


def seconds_to(score: float, curve: dict) -> float:
    """Wall-clock seconds at which the smoothed return of a curve first reaches a score; infinite if it never does."""
    reached = np.array(curve["wall_seconds"])[smooth(curve) >= score] if curve["global_step"] else []
    return float(reached[0]) if len(reached) else math.inf


def main(args: Args) -> int:
    """Make all runs that `args` asks for and are not finished, then import; returns the exit status, 1 on a failure."""
    if args.jobs < 1 or not (args.agents or args.imports):
        fail("--jobs must be at least 1, and --agents or --import say of what to keep the results")
    newest = {identity(record): record for record in read_learning(args.results)}
    finished = {key for key, record in newest.items() if "failed" not in record and record["stopped_by"] is None}
    jobs, failed = plan(args, finished) if args.agents else [], False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.results.mkdir(parents=True, exist_ok=True)
    print(table_line("agent", "environment", "seed", "steps", "evaluation", "training", "seconds"), flush=True)
    note = {"note": args.note} if args.note else {}
    imported = (describe_machine() | read_run(run_dir) | note for run_dir in args.imports)
    runs = run_jobs(jobs, args.jobs)
    try:
        for record in tqdm(itertools.chain(runs, imported), total=len(jobs) + len(args.imports), unit=" runs"):
            if record.get("date"):
                fps.append(args.results / f"{record['agent']}.jsonl", record)
            names = ("agent", "env_id", "seed", "global_step", "eval_return_mean", "train_return_mean", "wall_seconds")
            line = table_line(*map(record.get, names))
            tqdm.write(line if "failed" not in record else f"{line}  failed: {record['failed']}")
            failed |= "failed" in record
    except KeyboardInterrupt:
        print("interrupted: the runs under way go on when this is started again", file=sys.stderr)
        return 130
    finally:
        runs.close()
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", status=1)
