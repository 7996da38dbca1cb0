"""Speed of the agents on this machine, beside that of their environments alone.

    python benchmarks/fps.py --suite quick        # four agents, in under 3 minutes
    python benchmarks/fps.py --suite gpu          # 8 to 256 environments, in under 8 minutes; again: goes on from there
    python benchmarks/fps.py --suite gpu --rehearse --agents ppo_atari     # the same order on a CPU, in tiny runs
    python benchmarks/fps.py --agents ppo my_agent.py --modes eager compile --num-envs 8 32
    python benchmarks/fps.py --agents ppo --modes eager --profile

SPS is agent steps per second over all environments; on Atari, frames per second = SPS x frame_skip.

Each run is a process of its own and goes through the agent's command line. The configurations take turns, so that a
drift of the machine meets all of them alike. All configurations of an agent share a compiler cache: the first compiled
run finds it empty ("cold"), a repeated one full ("warm"), others with what they have in common ("shared"). The mode
"env-only" steps the agent's own environments with random actions: what the agent would reach if acting and learning
took no time. Every run is appended to the results at once, as a line of JSON; benchmarks/report.py makes tables and
plots of them.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import report
import tyro
from results import fail, read_speeds
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results.jsonl"
WARM_UP = 3  # iterations that come before those that an agent's SPS counts
STARTS = 1000  # steps, at most, before the first update of an agent with a replay buffer: they say nothing of its speed
SHORT = {"num_iterations_obs_norm_init": 1}  # settings, of agents that have them, of what comes before training
TINY = {"num_steps": 16, "torch_threads": 1, "env_threads": 1}  # settings in a rehearsal, of agents that have them
LIMIT = 240  # seconds, beside ten times those that count: a run that takes longer hangs
FIRST = ("ppo_atari", "pqn_atari", "ppo_continuous_action", "sac_continuous_action")  # of both suites
FIGURES = ("agent_command", "env_id", "frame_skip", "device", "num_envs", "sps", "sps_rollout", "sps_update",
           "compile_seconds", "wall_seconds", "global_step", "host_memory_mib", "device_memory_mib", "cuda", "trace",
           "iteration_steps", "learning_starts", "cache")  # fmt: skip
MACHINE = ("commit", "torch", "gpu", "cpu", "cores", "device", "all_flags")  # what one session of a suite has in
RUN = ("agent", "code", "mode", "num_envs", "repeat")  # common, and what its runs differ in


@dataclass
class Args:
    suite: Literal["quick", "gpu"] | None = None
    """a choice of the other flags; those given beside it overrule it"""
    agents: tuple[str, ...] = ()
    """names of agents in agents/, or paths of agent files anywhere; none takes all of agents/"""
    modes: tuple[Literal["env-only", "eager", "compile", "cudagraphs", "compile-cudagraphs"], ...] = ()
    """modes to run the agents in, after env-only; none takes eager and the mode with all that the device can do"""
    num_envs: tuple[int, ...] = ()
    """numbers of environments; none takes each agent's own"""
    device: str = "auto"
    """the agents' --device"""
    agent_flags: str = ""
    """further flags for every agent, in one string after a "=": --agent-flags="--env-id Acrobot-v1 --num-steps 64" """
    repeats: int = 3
    """runs of each configuration, the cold one included"""
    seconds: float = 5.0
    """how long a run trains, about; never less than two iterations after those that warm up"""
    minutes: float = 60.0
    """when this time is up the run under way is dropped and no other begun"""
    results: Path = RESULTS
    """file that every run is appended to"""
    resume: bool = False
    """leave out what the results have of this commit, device and configuration"""
    cache: Path | None = None
    """folder for the compiler caches, for later calls to go on with; none takes a temporary one"""
    rehearse: bool = False
    """go through all runs on the CPU, each as short as can be and in eager mode, and keep no results unless --results
    names a file"""
    profile: bool = False
    """measure nothing; write a torch profiler trace and a table of the ten costliest operators of one iteration"""
    profile_dir: Path = ROOT / "runs/profiles"
    """folder for the traces, which ui.perfetto.dev shows, and the tables"""


SUITES = {
    None: Args(),
    "quick": Args(agents=FIRST, repeats=1, seconds=1, minutes=2.8),
    "gpu": Args(seconds=2, minutes=7.8, modes=("compile-cudagraphs", "eager"), num_envs=(8, 64, 256), resume=True,
                cache=ROOT / "runs/fps_cache"),
}  # fmt: skip


# ---- in a process of its own -----------------------------------------------------------------------------------------


def env_only() -> None:
    """Step an agent's environments with random actions; prints their speed and what `measure` has to know.

    Command line: AGENT SECONDS FLAGS, with the agent's own flags.
    """
    path, seconds, *flags = sys.argv[1:]
    agent = load_agent(Path(path))
    args = agent.parse_args(flags)

    envs = agent.make_envs(args, args.num_envs, args.seed)
    space = envs.single_action_space
    actions = np.array([[space.sample() for _ in range(args.num_envs)] for _ in range(32)])
    if np.issubdtype(actions.dtype, np.integer):
        actions = actions.astype(np.int32)  # as envpool wants them
    envs.reset()
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < float(seconds) or not steps:
        envs.step(actions[steps % len(actions)])
        steps += 1

    figures = {"env_id": args.env_id, "frame_skip": getattr(args, "frame_skip", 1), "num_envs": args.num_envs}
    figures |= {"sps": steps * args.num_envs / elapsed, "learning_starts": getattr(args, "learning_starts", 0)}
    print(json.dumps(figures | {"iteration_steps": args.num_envs * getattr(args, "num_steps", 1)} | memory()))


def train() -> None:
    """Run an agent as `python AGENT FLAGS` does, then print the memory that it took. Command line: AGENT FLAGS."""
    run_script(sys.argv[1:])
    print(json.dumps(memory()))


def profile() -> None:
    """Run an agent and record one iteration of it, which lasts from one update of its progress bar to the next.

    Command line: TRACE SKIPPED AGENT FLAGS; TRACE is the file for the trace, SKIPPED (at least 1) how many iterations
    go before. The table of operators goes beside the trace, as text.
    """
    import torch

    trace, skipped, *agent = sys.argv[1:]
    Path(trace).unlink(missing_ok=True)

    update, updates = tqdm.update, itertools.count(1)
    profiler = torch.profiler.profile()  # begun after compilation, which fails under it

    def recorded_update(bar, n=1):
        update(bar, n)
        number = 0 if bar.disable else next(updates)  # the compiler has bars, too, which show nothing
        if number == int(skipped):
            profiler.start()
        elif number == int(skipped) + 1:
            profiler.stop()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            table = profiler.key_averages().table(f"self_{device}_time_total", row_limit=10, max_name_column_width=50)
            Path(trace).with_suffix(".txt").write_text(table)
            profiler.export_chrome_trace(trace)

    tqdm.update = recorded_update
    run_script(agent)
    if not Path(trace).is_file():
        sys.exit("error: no iteration was recorded, for want of enough updates of a progress bar")
    print(json.dumps({"trace": trace}))


def load_agent(path: Path):
    """An agent's file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    agent = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    return agent


def run_script(argv: list[str]) -> None:
    """Run `python SCRIPT FLAGS` in this process; a status other than 0 ends it."""
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def memory() -> dict:
    """Peak memory of this process in MiB, and the CUDA version that its torch was built for.

    Host: resident, without the compiler's own processes. Device: what torch reserved, graphs included; None on a CPU.
    """
    unit = 2**20 if sys.platform == "darwin" else 2**10
    figures = {"host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    if (status := Path("/proc/self/status")).exists():  # on Linux ru_maxrss may be that of the parent process
        figures = {"host_memory_mib": int(status.read_text().partition("VmHWM:")[2].split()[0]) // 2**10}
    if torch := sys.modules.get("torch"):
        used = torch.cuda.is_initialized()
        figures["device_memory_mib"] = torch.cuda.max_memory_reserved() // 2**20 if used else None
        figures["cuda"] = torch.version.cuda
    return figures


def run(function: str, *arguments, timeout: float, **env: str) -> dict:
    """Call a function of this file in a process of its own; returns the JSON objects that it printed last, as one.

    Raises RuntimeError with the reason of a failure, and subprocess.TimeoutExpired after `timeout` seconds.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-c", f"import fps; fps.{function}()", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        env=os.environ | env | {"PYTHONPATH": path},
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=timeout)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)  # with the compiler's processes
        child.wait()
        raise
    if child.returncode:
        raise RuntimeError(reason(err, child.returncode))
    try:
        return {key: value for line in out.splitlines()[-2:] for key, value in json.loads(line).items()}
    except (ValueError, AttributeError):
        raise RuntimeError("the last line that it printed is not a summary in JSON") from None


def reason(err: str, code: int) -> str:
    """Why a process failed, in a sentence: its own "error: " or its last words on stderr, and how it ended."""
    said = [line.strip() for line in err.splitlines() if line.strip()] or ["no message"]
    words = next((line for line in said if line.startswith("error: ")), said[-1]).removeprefix("error: ")
    return f"{words[:200]} ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"


# ---- what to measure -------------------------------------------------------------------------------------------------


def find_agents(names) -> list[Path]:
    """The files of the agents with these names or paths; of all agents in agents/ if there are none."""
    known = {path.stem: path for path in sorted((ROOT / "agents").glob("*.py"))}
    for name in names:
        if name not in known and not Path(name).is_file():
            fail(f"--agents {name}: neither a file nor one of {', '.join(known)}")
    return [known.get(name) or Path(name).resolve() for name in names] or list(known.values())


def configurations(args: Args, gpu: bool) -> list[tuple[Path, str, int | None]]:
    """Agent, mode and num_envs (None: the agent's own) of all that is to be measured; agents in turns.

    "env-only" precedes the modes with as many environments. The gpu suite begins with the agents of FIRST, and has its
    first mode at every number of environments, the others at the first number only.
    """
    agents, plan = find_agents(args.agents), []
    modes = args.modes or ("eager", "compile-cudagraphs" if gpu else "compile")
    if args.suite != "gpu":
        groups, everywhere, once = [agents], modes, ()
    else:
        groups = [[agent for name in FIRST for agent in agents if agent.stem == name]]
        groups.append([agent for agent in agents if agent not in groups[0]])
        everywhere, once = modes[:1], modes[1:]
    sizes = args.num_envs or (None,)
    for group in groups:
        plan += itertools.product(sizes, ("env-only", *everywhere), group)
        plan += itertools.product(sizes[:1], once, group)
    return [*dict.fromkeys((agent, mode, num_envs) for num_envs, mode, agent in plan)]


def measure(
    args: Args, agent: Path, mode: str, num_envs: int | None, known: dict, sps: float | None, cache: Path,
    timeout: float,
) -> dict:  # fmt: skip
    """Run one configuration once; returns its figures, with the agent's command line. Raises what `run` raises.

    `known` are the figures of its "env-only", `sps` is the speed to expect of it, if any; `cache` is the folder for
    what the compiler keeps of this agent.
    """
    flags = ["--device", args.device, *([] if num_envs is None else ["--num-envs", str(num_envs)])]
    flags += shlex.split(args.agent_flags)
    small = SHORT | (TINY if args.rehearse else {})
    there = [name for name in small if f"\n    {name}: int" in agent.read_text()]
    flags += [f"--{name.replace('_', '-')}={small[name]}" for name in there]
    if mode == "env-only":
        return run("env_only", agent, args.seconds, *flags, timeout=timeout)
    if "sps" not in known:
        raise RuntimeError("its environments do not run alone")
    size, start = known["iteration_steps"], min(known["learning_starts"], STARTS)
    first = math.ceil(start / size) + (0 if args.rehearse else WARM_UP)  # iterations before those that count
    part = 50 if known["learning_starts"] else 4  # agents that learn from replay take long for their updates
    counted = max(2, math.ceil(args.seconds * (sps or known["sps"] / part) / size))  # before the first run a guess
    flags += ["--learning-starts", str(start)] if start else []
    flags += ["--mode", "eager" if args.rehearse else mode, "--total-timesteps", str(size * (first + counted))]
    flags += ["--eval-episodes", "0"]
    function = ["train"]
    if args.profile:
        function = ["profile", args.profile_dir / f"{agent.stem}_{mode}_{known['num_envs']}.json", max(1, first)]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    mark = cache / f"{mode}_{known['num_envs']}"  # of what the cache has seen
    seen = "warm" if mark.exists() else "shared" if "compile" in mode and any(cache.glob("*compile*")) else "cold"
    with tempfile.TemporaryDirectory(prefix="fps-", ignore_cleanup_errors=True) as run_dir:
        figures = run(*function, agent, *flags, "--run-dir", run_dir, timeout=timeout, **caches)
        if not figures.get("sps"):
            raise RuntimeError("the run ended before its speed was measured")
    cache.mkdir(parents=True, exist_ok=True)
    mark.touch()
    name = agent.relative_to(ROOT) if agent.is_relative_to(ROOT) else agent.name
    return figures | {"agent_command": shlex.join(["python", str(name), *flags]), "cache": seen}


# ---- the machine -----------------------------------------------------------------------------------------------------


def describe_gpu() -> dict:
    """Name, power limit in watts and driver of the first GPU, and how many there are; None where nvidia-smi is not."""
    query = ["nvidia-smi", "--query-gpu=name,power.limit,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    name, watts, driver = lines[0].split(", ") if lines else (None, "", None)
    watts = float(watts) if re.fullmatch(r"[0-9.]+", watts) else None
    return {"gpu": name, "gpu_count": len(lines), "gpu_power_limit_watts": watts, "driver": driver}


def describe_cpu() -> dict:
    """The processor's name with the widest vectors it computes in, which virtual machines leave out of the name, and
    how many of its cores this process may use, by affinity and control group.
    """
    try:
        name, flags = (re.search(rf"{key}\s*: (.*)", Path("/proc/cpuinfo").read_text())[1] for key in ("name", "flags"))
        widest = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}
        name += next((f" ({title})" for flag, title in widest.items() if flag in flags.split()), "")
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    except (OSError, ValueError):  # no control group, or "max": no quota
        pass
    return {"cpu": name, "cores": cores}


def git(*words) -> str | None:
    """What git says in this checkout; None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_code() -> dict:
    """The commit, whether what is measured differs from it (both None outside a checkout), and the versions.

    Where a copy without git is measured, the variable REDLINE_COMMIT can say of which commit.
    """
    changes, versions = git("status", "--porcelain", "agents", "benchmarks/fps.py"), {}
    for name in ("torch", "envpool"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # in a folder on PYTHONPATH
            versions[name] = None
    commit = git("rev-parse", "HEAD") or os.environ.get("REDLINE_COMMIT")
    dirty = None if changes is None else bool(changes)
    return {"commit": commit, "dirty": dirty, "python": platform.python_version()} | versions


# ---- the command -----------------------------------------------------------------------------------------------------


def append(path: Path, *records: dict) -> None:
    """Add lines of JSON to a file; a last line that was never finished stays one of its own."""
    try:
        with open(path, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            start = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(start + b"".join(json.dumps(record).encode() + b"\n" for record in records))
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}", status=1)


def table_line(*cells) -> str:
    """A line of the table that grows while measuring; numbers without decimals, "-" for what is not there."""
    cells = ["-" if cell is None else f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return "{:<26} {:<18} {:>8} {:>4} {:>11} {:>11} {:>11} {:>9} {:>6}".format(*cells)


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line; a suite sets the defaults of the other flags."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    return tyro.cli(Args, args=argv, description=__doc__, default=SUITES[args.suite])


def take_turns(args: Args, plan: list, common: dict, done: dict):
    """Measure all of `plan` `repeats` times, in turns, until the time is up; yields a record of every run.

    A configuration that fails is not tried again: its record has the reason under "failed", and no figures. Nor is one
    measured whose record is in `done`, by the fields of RUN.
    """
    deadline = time.monotonic() + 60 * args.minutes
    facts, speeds, failed = {}, {}, set()  # facts by agent and num_envs, speeds by configuration
    with tempfile.TemporaryDirectory(prefix="fps-", ignore_cleanup_errors=True) as scratch:
        turns = [*itertools.product(range(args.repeats), plan)]
        for repeat, config in tqdm(turns, unit=" runs", dynamic_ncols=True):
            if config in failed:
                continue
            (agent, mode, num_envs), started = config, time.monotonic()
            known = facts.get((agent, num_envs), {"num_envs": num_envs})
            code = hashlib.sha256(agent.read_bytes()).hexdigest()[:12]
            record = common | {"date": now(), "agent": agent.stem, "code": code, "mode": mode, "repeat": repeat}
            if not agent.is_relative_to(ROOT / "agents"):
                record["dirty"] = True  # this file is in no commit
            record |= {key: known[key] for key in ("env_id", "frame_skip", "num_envs") if key in known}
            old, left = done.get(tuple(map(record.get, RUN))), max(0, deadline - started)
            limit = min(left, LIMIT + 10 * args.seconds)
            try:
                if old and "failed" in old:
                    raise RuntimeError(old["failed"])
                cache = (args.cache or Path(scratch)) / f"{agent.stem}_{code}"
                figures = old or measure(args, *config, known, speeds.get(config), cache, timeout=limit)
            except subprocess.TimeoutExpired:
                if limit == left:
                    tqdm.write("the time is up; the rest is left out", file=sys.stderr)
                    return
                failed.add(config)
                record["failed"], figures = f"no end within {limit:.0f} s", {}
            except RuntimeError as error:
                failed.add(config)
                record["failed"], figures = str(error), {}
            speeds[config] = figures.get("sps")
            if mode == "env-only" and figures:
                facts[agent, num_envs] = figures
            if not old:
                record |= {key: figures[key] for key in FIGURES if key in figures}
                yield record | {"run_seconds": time.monotonic() - started}


def main(args: Args) -> int:
    """Measure, or profile, all that `args` asks for; returns the exit status, 1 if anything failed."""
    if args.rehearse:
        sizes = tuple(4 * (1 + i) for i in range(len(args.num_envs)))
        args = replace(args, device="cpu", seconds=0, num_envs=sizes, repeats=1, cache=None)
        args = replace(args, results=Path(os.devnull) if args.results == RESULTS else args.results)
    elif args.seconds <= 0:
        fail("--seconds must be more than 0")
    if min(args.repeats, args.minutes) <= 0:
        fail("--repeats and --minutes must be more than 0")
    machine = describe_gpu() | describe_cpu()
    if args.suite == "gpu" and not machine["gpu"] and not args.rehearse:
        fail("--suite gpu: nvidia-smi finds no GPU on this machine")
    device = args.device if args.device != "auto" else "cuda" if machine["gpu"] else "cpu"
    plan = configurations(args, gpu=device.startswith("cuda"))
    common = {"started": now(), "command": shlex.join(["python", "benchmarks/fps.py", *sys.argv[1:]])}
    flags = re.sub(r"--env-id[= ]\S+", "", args.agent_flags)  # the environment is a field of its own
    common |= describe_code() | machine | {"device": device, "agent_flags": " ".join(flags.split())}
    common["all_flags"] = args.agent_flags
    records, interrupted = [], False
    if args.profile:
        args = replace(args, repeats=1, seconds=0.1)  # speeds do not count: the profiler slows all down
        args.profile_dir.mkdir(parents=True, exist_ok=True)
    else:
        append(args.results)  # find out now whether it can be written
    if args.resume:
        records = [record for record in read_speeds(args.results) if session(record) == session(common)]
        common["started"] = max((r["started"] for r in records), default=common["started"])  # the same session goes on
    done, measured = {tuple(map(record.get, RUN)): record for record in records}, 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("SPS = agent steps per second; frames per second = SPS x frame_skip\n")
    print(table_line("agent", "mode", "num_envs", "turn", "SPS", "rollout", "update", "compile s", "run s"), flush=True)
    try:
        for record in take_turns(args, plan, common, done):
            records.append(record)
            measured += 1
            if not args.profile:
                append(args.results, record)
            shown = "agent mode num_envs repeat sps sps_rollout sps_update compile_seconds run_seconds".split()
            line = table_line(*map(record.get, shown))
            tqdm.write(line if "failed" not in record else f"{line}  failed: {record['failed']}")
            if "trace" in record:
                tqdm.write(f"{Path(record['trace']).with_suffix('.txt').read_text()}\n{record['trace']}\n")
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    if records and not args.profile and not args.rehearse:
        print(f"\n{report.full_table(report.summarise(records))}")
    if not args.profile:
        print(f"\nadded to {args.results}: {measured} runs")
    return 130 if interrupted else int(any("failed" in record for record in records))


def session(record: dict) -> list:
    """What the runs of one session have in common: the fields of MACHINE, with a device of cuda:0 as cuda."""
    return [record[name].partition(":")[0] if name == "device" else record.get(name) for name in MACHINE]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main(parse_args()))
