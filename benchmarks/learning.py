"""What the agents learn: many seeds on many environments, their curves, and how they compare with what others publish.

    python benchmarks/learning.py --agents ppo --env-ids CartPole-v1 Acrobot-v1 --jobs 2     # five seeds of each
    python benchmarks/learning.py --agents ppo --agent-flags="--num-envs 8 --num-steps 128"
    python benchmarks/learning.py --import runs/pong                # a run made by hand, however often it was resumed
    python benchmarks/learning.py                                   # only write the tables and plots anew
    python benchmarks/learning.py --check                           # write nothing; status 1 if they are out of date

Every run goes through the agent's command line and ends up as one line of JSON in benchmarks/learning/AGENT.jsonl: its
settings, code, machine, final score and curve. What was measured is kept when this is interrupted; started again, it
leaves out what is finished, goes on with what is not, and tries again what failed. A run is the same as another if
agent, environment, seed, settings, mode and kind of device are, whatever the code was: to measure a new version, remove
the lines of the old one. If there are two lines for the same run, the later one counts.

Tables go between the markers `<!-- learning:begin -->` and `<!-- learning:end -->` of README.md and
benchmarks/README.md, curves into benchmarks/plots/; published.json has what they are compared with.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import fps
import numpy as np
import report
import tyro
from fps import ROOT, fail
from tqdm import tqdm

BEGIN, END = "<!-- learning:begin -->", "<!-- learning:end -->"
PUBLISHED = Path(__file__).with_name("published.json")
CURVE = ("global_step", "wall_seconds", "episodic_return")
POINTS = 200  # of a curve, at most
SMOOTH = 20  # a smoothed return is the mean over the last twentieth of the run
SUMMARY = ("device", "mode", "torch", "num_envs", "global_step", "train_return_mean", "eval_return_mean",
           "eval_return_std", "eval_episodes", "eval_returns", "sps", "compile_seconds", "wall_seconds",
           "stopped_by")  # fmt: skip
BESIDE = {"seed", "env_id", "run_dir", "resume", "evaluate", "checkpoint_minutes", "video", "track"}  # no settings


@dataclass
class Args:
    agents: tuple[str, ...] = ()
    """names of agents in agents/, or paths of agent files anywhere; none trains nothing"""
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
    check: bool = False
    """write nothing; end with status 1 if a file is not what would be written"""
    work_dir: Path = ROOT / "runs/learning"
    """folder for the runs; those that are finished get the time behind their names"""
    root: Path = ROOT
    """folder with README.md and benchmarks/"""


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
        resumed_at = max((event.step for event in events if event.HasField("session_log")), default=0)
        points = [point for point in points if point[0] <= resumed_at]
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
    """The first commit that has this agent's file; HEAD and dirty if none has, None of both outside a checkout."""

    def git(*words):
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
        return done.stdout.split() if done.returncode == 0 else []

    head, blob = git("rev-parse", "HEAD"), git("hash-object", script.absolute())
    if not head or not blob:
        return {"commit": None, "dirty": None}
    # commits that brought or removed the file, newest first; -m because a merge can bring one that no parent has
    known = git("log", "-m", "--format=%H", "--find-object", *blob, "--", f"agents/{script.name}")
    return {"commit": known[-1] if known else head[0], "dirty": not known}


def settings_of(record: dict) -> dict:
    """What a run's curve against steps depends on, seed and environment aside."""
    return {name: value for name, value in record["args"].items() if name not in ("device", "mode")}


def identity(record: dict) -> tuple:
    """What makes two runs the same but for their seed: agent, environment, kind of device, mode and settings."""
    device = record["gpu"] or "cuda" if record["device"].startswith("cuda") else "cpu"
    return record["agent"], record["env_id"], device, record["mode"], json.dumps(settings_of(record), sort_keys=True)


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
    agents = [(script, fps.load_agent(script)) for script in fps.find_agents(args.agents)]
    for seed in args.seeds:
        for script, agent in agents:
            for env_id in args.env_ids or (agent.Args().env_id,):
                argv = ["--env-id", env_id, "--seed", str(seed), *shlex.split(args.agent_flags)]
                settings = agent.parse_args(argv)
                device, mode = agent.check_args(settings)
                about = {"agent": script.stem, "env_id": env_id, "seed": seed, "device": str(device), "mode": mode}
                about |= {"gpu": gpu, "args": changed_settings(agent, asdict(settings))}
                about |= {"note": args.note} if args.note else {}
                digest = hashlib.sha256(repr(identity(about)).encode()).hexdigest()[:8]
                run_dir = args.work_dir.absolute() / f"{env_id}__{script.stem}__{seed}__{digest}"
                if (identity(about), seed) not in finished:
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


def train(args: Args, results: Path) -> int:
    """Make all runs that `args` asks for and are not finished; returns the exit status, 1 if anything failed."""
    if args.jobs < 1:
        fail("--jobs must be at least 1")
    records = read_results(results)
    jobs = plan(args, {(identity(record), record["seed"]) for record in newest(records) if is_final(record)})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(table_line("agent", "environment", "seed", "steps", "evaluation", "training", "seconds"), flush=True)
    failed, runs = [], run_jobs(jobs, args.jobs)
    try:
        for record in tqdm(runs, total=len(jobs), unit=" runs", dynamic_ncols=True):
            if record.get("date"):
                results.mkdir(parents=True, exist_ok=True)
                fps.append(results / f"{record['agent']}.jsonl", record)
            names = ("agent", "env_id", "seed", "global_step", "eval_return_mean", "train_return_mean", "wall_seconds")
            line = table_line(*map(record.get, names))
            tqdm.write(line if "failed" not in record else f"{line}  failed: {record['failed']}")
            failed += [record] if "failed" in record else []
    except KeyboardInterrupt:
        print("interrupted: the runs under way go on when this is started again", file=sys.stderr)
        return 130
    finally:
        runs.close()
    return int(bool(failed))


# ---- results ---------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> list[dict]:
    """The records of all results files; ends with a sentence about the first line that is none."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            try:
                record = json.loads(line)
                missing = {*"agent env_id seed args device mode gpu cpu cores date".split()} - record.keys()
                missing |= set() if "failed" in record else {"global_step", "curve", "wall_seconds"} - record.keys()
            except (ValueError, AttributeError):
                fail(f"{path}, line {number}: is not a record in JSON: {line[:60]!r}")
            if missing:
                fail(f"{path}, line {number}: is a record without {', '.join(sorted(missing))}")
            records.append(record)
    return records


def newest(records: list[dict]) -> list[dict]:
    """The last record of every run."""
    return [*{(identity(record), record["seed"]): record for record in records}.values()]


def is_final(record: dict) -> bool:
    """Whether a run came to its end."""
    return "failed" not in record and record["stopped_by"] is None


def smooth(curve: dict) -> dict[str, np.ndarray]:
    """A curve whose return at each step is the mean of the points in the last 1/SMOOTH of the run's steps."""
    curve = {name: np.asarray(values, dtype=float) for name, values in curve.items()}
    steps, returns = curve["global_step"], curve["episodic_return"]
    window = steps[-1] / SMOOTH if len(steps) else 0
    means = [returns[(steps > step - window) & (steps <= step)].mean() for step in steps]
    return curve | {"episodic_return": np.array(means)}


def seconds_to(score: float, curve: dict) -> float:
    """Wall-clock seconds at which the smoothed return of a curve first reaches a score; infinite if it never does."""
    curve = smooth(curve)
    reached = curve["wall_seconds"][curve["episodic_return"] >= score]
    return float(reached[0]) if len(reached) else math.inf


def iqm(scores: np.ndarray) -> np.ndarray:
    """The interquartile mean over the last axis: that of the middle half, the quarters below and above left out.

    Agarwal et al. 2021, arXiv 2108.13264; where a quarter is not a whole number of scores, fewer are left out.
    """
    scores = np.sort(scores, axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray, repeats: int = 2000, level: float = 0.95) -> np.ndarray:
    """Ends [2, ...] of a confidence interval of the IQM over all of scores [tasks, runs, ...].

    The percentile bootstrap stratified by task (Agarwal et al. 2021): a sample draws, for each task, as many of its
    runs as it has, with replacement. A run is drawn as a whole, with all of its curve.
    """
    tasks, runs = scores.shape[:2]
    draws = np.random.default_rng(0).integers(runs, size=(repeats, tasks, runs))
    samples = scores[np.arange(tasks)[:, None], draws]  # [repeats, tasks, runs, ...]
    samples = np.moveaxis(samples.reshape(repeats, tasks * runs, *scores.shape[2:]), 1, -1)
    return np.percentile(iqm(samples), [50 * (1 - level), 50 * (1 + level)], axis=0)


def align(curves: list[dict], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """POINTS places on an axis that all curves reach, and the smoothed returns there [runs, POINTS]."""
    curves = [smooth(curve) for curve in curves]
    ends = max(curve[axis][0] for curve in curves), min(curve[axis][-1] for curve in curves)
    places = np.linspace(*ends, POINTS)
    return places, np.array([np.interp(places, curve[axis], curve["episodic_return"]) for curve in curves])


def base_name(env_id: str) -> str:
    """An environment's name without what differs between its versions: PongNoFrameskip-v4, Pong-v5 -> Pong."""
    return re.sub(r"(NoFrameskip)?-v\d+$", "", env_id)


def summarise(records: list[dict], published: dict) -> list[dict]:
    """One row per environment, agent, settings and kind of device, in this order, over the newest runs of its seeds."""
    groups = {}
    for record in sorted(newest(records), key=lambda record: record["seed"]):
        groups.setdefault(identity(record), []).append(record)
    rows = []
    for key in sorted(groups, key=lambda key: (key[1], key[0], *key[2:])):
        runs = [run for run in groups[key] if "failed" not in run]
        name = base_name(key[1])
        row = {"agent": key[0], "env_id": key[1], "flags": shlex.join(flags(settings_of(groups[key][0]))), "runs": runs}
        row |= {"failed": [run["seed"] for run in groups[key] if "failed" in run]}
        machines = sorted({report.machine(run) for run in runs or groups[key]})
        row |= {"machine": f"{' or '.join(machines)}, {key[3]}"}
        row |= {"source": ", ".join(sorted({source(run) for run in groups[key]}))}
        row |= {"curves": [run["curve"] for run in runs if run["curve"]["global_step"]]}
        of_env = [figure for figure in published["figures"] if base_name(figure["env_id"]) == name]
        row |= {"published": [figure for figure in of_env if figure["agent"] == row["agent"]]}
        row |= {"score": next((s["score"] for s in published["scores"] if base_name(s["env_id"]) == name), None)}
        rows.append(row)
    return rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def source(run: dict) -> str:
    """Day and commit of a run; a + after a commit that its code differed from."""
    return f"{run['date'][:10]} {(run['commit'] or 'no commit')[:7]}{'+' * bool(run['dirty'])}"


def decimal(value: float) -> str:
    """A return with as many decimals as it bears: 20.41, 414.7, 9635."""
    return f"{value:.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation of what the seeds scored."""
    return f"{decimal(np.mean(values))} ± {decimal(np.std(values))}" if values else "–"


def figures(row: dict, name: str) -> list[float]:
    """A figure of the summaries of a row's runs, from those that have it."""
    return [run[name] for run in row["runs"] if run[name] is not None]


def evaluation(row: dict) -> str:
    """Interquartile mean of the seeds' evaluations, and its confidence interval."""
    values = np.array(figures(row, "eval_return_mean"))
    if len(values) < 2:
        return decimal(values[0]) if len(values) else "–"
    return f"{decimal(iqm(values))} ({' to '.join(map(decimal, interval(values[None])))})"


def steps(row: dict) -> str:
    """How far the runs of a row went, and how far those that were stopped were to go."""
    most = max((run["global_step"] for run in row["runs"]), default=None)
    stopped = [run for run in row["runs"] if run["stopped_by"]]
    return report.number(most) + (f" ({len(stopped)} stopped)" if stopped else "")


def seeds(row: dict) -> str:
    """How many seeds ended, and how many failed."""
    return f"{len(row['runs'])}" + (f" ({len(row['failed'])} failed)" if row["failed"] else "")


def time_to_score(row: dict) -> str:
    """The median over the seeds of the time to the environment's score; a dash if fewer than half reach it."""
    if row["score"] is None or not row["curves"]:
        return "–"
    times = [seconds_to(row["score"], curve) for curve in row["curves"]]
    middle, reached = float(np.median(np.array(times))), sum(map(math.isfinite, times))
    few = "" if reached == len(times) else f" ({reached} of {len(times)} seeds)"
    return f"{clock(middle) if math.isfinite(middle) else '–'} to {row['score']:g}{few}"


def clock(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def published_figure(figure: dict) -> str:
    """What others publish, with its steps and where it is from."""
    return f"{decimal(figure['mean'])} ± {decimal(figure['std'])} at {figure['steps'] / 1e6:g}M ({figure['source']})"


def table(rows: list[dict], full: bool = False) -> str:
    """A line per environment, agent and settings, beside what others publish of the same; `full` with every seed."""
    header = ["Environment", "Agent", "Steps", "Seeds", "Evaluation: IQM (95 % interval)", "Last 100 training games",
              "Published", "Wall-clock", "Time to score", "Machine, mode"]  # fmt: skip
    cells = []
    for row in rows:
        walls = figures(row, "wall_seconds")
        cells.append([
            row["env_id"], f"{row['agent']} {row['flags']}".strip(), steps(row), seeds(row), evaluation(row),
            spread(figures(row, "train_return_mean")), "; ".join(map(published_figure, row["published"])) or "–",
            clock(float(np.median(walls))) if walls else "–", time_to_score(row), row["machine"],
        ])  # fmt: skip
        if full:
            each = [f"{run['seed']}: {decimal(run['eval_return_mean'])}" for run in row["runs"]
                    if run["eval_return_mean"] is not None]  # fmt: skip
            cells[-1] += [", ".join(each + [f"{seed}: failed" for seed in row["failed"]]) or "–", row["source"]]
    return report.markdown(header + ["Evaluation of each seed", "Measured"] * full, cells)


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot_curves(rows: list[dict]):
    """Curves of all agents on one environment, against steps and against time: IQM of the seeds, band, each seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure((11, 4.2), layout="constrained", dpi=90)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(rows):
        color, name = f"C{number % 10}", f"{row['agent']} {row['flags']}".strip()
        for axis, along in ((left, "global_step"), (right, "wall_seconds")):
            unit = 1 if along == "global_step" else time_unit(rows)[1]
            for curve in map(smooth, row["curves"]):
                axis.plot(curve[along] / unit, curve["episodic_return"], color=color, alpha=0.25, linewidth=0.8)
            places, returns = align(row["curves"], along)
            label = f"{name}, {len(returns)} seed{'s' * (len(returns) > 1)}, {row['machine']}"
            axis.plot(places / unit, iqm(returns.T), color=color, linewidth=2, label=label)
            if len(returns) > 1:
                axis.fill_between(places / unit, *interval(returns[None]), color=color, alpha=0.2, linewidth=0)
        for published, style in zip(row["published"], itertools.cycle((":", "--", "-."))):
            left.axhline(
                published["mean"], color=color, linestyle=style, linewidth=1, label=published_figure(published)
            )
    left.set(title=rows[0]["env_id"], xlabel="environment steps", ylabel="return of training games")
    right.set(title=rows[0]["env_id"], xlabel=f"wall-clock {time_unit(rows)[0]}")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    left.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.5M
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    return figure


def time_unit(rows: list[dict]) -> tuple[str, int]:
    """The unit for the times of these rows and its seconds."""
    longest = max(curve["wall_seconds"][-1] for row in rows for curve in row["curves"])
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if longest >= 2 * unit[1]), ("seconds", 1))


# ---- files -----------------------------------------------------------------------------------------------------------


NOTE = f"""Evaluations are of whole games after training, the same number for every seed: the interquartile mean (IQM)
of the seeds with its 95 % bootstrap interval (Agarwal et al. 2021, arXiv 2108.13264). "Last 100 training games" is the
mean of the seeds ± their standard deviation, as "Published" is, and what compares with it: both act as in training.
Wall-clock is the median of the seeds, from the start of the program to its end, evaluation included; "time to score"
counts from the start of training to where the training return, averaged over the last {100 // SMOOTH} % of the run's
steps, first reaches the score. A `+` after a commit marks code that differs from it."""


def readme_block(rows: list[dict]) -> str:
    """What goes between the markers of README.md."""
    return f"{table(rows)}\n\n{NOTE}\nCurves and every seed: [benchmarks/README.md](benchmarks/README.md#learning)."


def benchmarks_block(rows: list[dict], names: dict[str, str]) -> str:
    """What goes between the markers of benchmarks/README.md; `names` are the pictures' by environment."""
    caption = """Curves: thick the IQM of the seeds with its 95 % interval, thin each seed, smoothed over the last
5 % of the run's steps; across, without a curve, the published means that the table compares with."""
    pictures = [f"![Learning curves on {env_id}](plots/{name})" for env_id, name in names.items()]
    return "\n\n".join([NOTE, table(rows, full=True), *([caption] if pictures else []), *pictures])


def write_report(args: Args, results: Path) -> int:
    """Write what is out of date, or with `check` only name it; returns the exit status."""
    folder, readme = args.root / "benchmarks", args.root / "README.md"
    records = read_results(results) or fail(f"{results}: no results yet; --agents makes them")
    rows = summarise(records, json.loads(PUBLISHED.read_text()))
    by_env = {}
    for row in rows:
        if row["curves"]:
            by_env.setdefault(row["env_id"], []).append(row)
    names = {env_id: f"learning_{env_id.replace('/', '_')}.png" for env_id in by_env}
    files = {
        readme: report.fill(readme, None, readme_block(rows), BEGIN, END),
        folder / "README.md": report.fill(folder / "README.md", report.PAGE, benchmarks_block(rows, names), BEGIN, END),
    }
    pictures = {}
    for env_id, group in by_env.items():
        digest = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(group).encode()).hexdigest()
        pictures[folder / "plots" / names[env_id]] = digest, partial(plot_curves, group)
    return report.publish("learning.py", files, pictures, args.check)


def main(args: Args) -> int:
    """Train, import, report, in this order, what `args` asks for; returns the exit status."""
    if args.check and (args.agents or args.imports):
        fail("--check: writes nothing, so --agents and --import cannot be given with it")
    results = args.root / "benchmarks/learning"
    status = train(args, results) if args.agents else 0
    for run_dir in args.imports:
        record = describe_machine() | read_run(run_dir) | ({"note": args.note} if args.note else {})
        results.mkdir(parents=True, exist_ok=True)
        fps.append(results / f"{record['agent']}.jsonl", record)
    if status and not read_results(results):
        return status
    return write_report(args, results) or status


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ImportError as error:
        fail(f"the plots need matplotlib ({error})", status=1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", status=1)
