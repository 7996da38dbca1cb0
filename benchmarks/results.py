"""Reads the results of fps.py, peers.py and learning.py and reduces them to rows, which report.py shows.

Of what was measured more than once, the newest counts. Nothing here names an agent, an environment or a machine.
"""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

import numpy as np

MODES = ["env-only", "eager", "compile", "cudagraphs", "compile-cudagraphs"]
SPEED = "started agent mode num_envs device cpu cores gpu gpu_power_limit_watts".split()  # fields of every record
LEARNED = "agent env_id seed args device mode gpu cpu cores commit dirty date".split()
COMPARED = "comparison agent peer cpu cores commit date".split()
# flags that are not the algorithm's: a table does not list them as settings of a run
NEUTRAL = "device mode env_threads torch_threads checkpoint_buffer eval_episodes total_timesteps".split()
UNEQUAL = ("-defaults", "-bf16")  # endings of comparisons whose two sides have different settings
POINTS = 200  # of a drawn curve
SMOOTH = 20  # a smoothed return is the mean over the last twentieth of the run


def fail(message: str, status: int = 2):
    """End the process with one sentence on stderr: status 2 for bad input, 1 for a failure while running."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# ---- results ---------------------------------------------------------------------------------------------------------


def read_records(paths, always, measured) -> list[dict]:
    """The records of files with a line of JSON each; none of a file that is not there.

    Ends with a sentence about the first line without a field of `always`, or of `measured` where nothing failed.
    """
    records = []
    for path in filter(Path.is_file, paths):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            try:
                record = json.loads(line)
                fields = [*always] if "failed" in record else [*always, *measured]
                missing = [name for name in fields if name not in record.keys()]
            except (ValueError, TypeError, AttributeError):
                fail(f"{path}, line {number}: is not a record in JSON: {line[:60]!r}")
            if missing:
                fail(f"{path}, line {number}: is a record without {', '.join(missing)}")
            records.append(record)
    return records


def read_speeds(path: Path) -> list[dict]:
    """The records of fps.py's runs."""
    return read_records([path], SPEED, ["sps"])


def read_peers(path: Path) -> list[dict]:
    """The records of peers.py's comparisons."""
    return read_records([path], COMPARED, ["ratios", "sps", "peer_settings"])


def read_learning(folder: Path) -> list[dict]:
    """The records of learning.py's runs."""
    return read_records(sorted(folder.glob("*.jsonl")), LEARNED, ["global_step", "curve", "wall_seconds", "stopped_by"])


def machine(record: dict) -> str:
    """The machine's name: its processor and, for runs on a GPU, that GPU."""
    cpu = re.sub(r"\((R|TM)\)| CPU| Processor| @.*| \d+-Core", "", record["cpu"])
    cpu = f"{cpu.strip()}, {record['cores']} core{'s' * (record['cores'] > 1)}"
    if not record.get("device", "cpu").startswith("cuda"):
        return cpu
    watts = f" {record['gpu_power_limit_watts']:.0f} W" if record.get("gpu_power_limit_watts") else ""
    return f"{record['gpu']}{watts} + {cpu}"


def summarise(records: list[dict]) -> list[dict]:
    """One row for each machine, agent, flags, environment, num_envs and mode, in this order: its newest call of fps.py.

    Speeds are in steps per second, compile times in seconds, memory in MiB; None where nothing was measured.
    """
    groups = {}
    for record in records:
        name = f"{record['agent']} {record.get('agent_flags', '')}".strip()
        where = machine(record), name, record.get("env_id") or "", record["num_envs"] or 0
        groups.setdefault((*where, MODES.index(record["mode"])), []).append(record)
    rows = {}
    for key in sorted(groups):
        newest = max(run["started"] for run in groups[key])
        runs = [run for run in groups[key] if run["started"] == newest]
        rows[key] = {"machine": key[0], "agent": key[1]} | summarise_runs(runs)
    for key, row in rows.items():  # compared with rows of the same call only
        for name, mode in (("env_only_sps", "env-only"), ("eager_sps", "eager")):
            other = rows.get((*key[:-1], MODES.index(mode)))
            row[name] = other["sps"] if other and other["started"] == row["started"] else None
    return [*rows.values()]


def summarise_runs(runs: list[dict]) -> dict:
    """The row of one configuration: what its runs share, and medians of what they measured."""

    def values(name, **others):
        chosen = [run for run in runs if others.items() <= run.items()]
        return [run[name] for run in chosen if run.get(name) is not None] or [None]

    shared = "env_id num_envs mode started commit dirty device torch cuda driver envpool".split()
    measured = "sps sps_rollout sps_update host_memory_mib device_memory_mib".split()
    row = {name: runs[-1].get(name) for name in shared} | {name: median(values(name)) for name in measured}
    for cache in ("cold", "shared", "warm"):
        row[cache] = None if row["mode"] == "eager" else median(values("compile_seconds", cache=cache))
    row |= {"low": min(values("sps")), "high": max(values("sps")), "runs": len([run for run in runs if run.get("sps")])}
    return row | {"failed": "; ".join(run["failed"] for run in runs if "failed" in run)}


def fastest_setups(rows: list[dict]) -> dict[str, list[list[dict]]]:
    """For CPU and GPU, agents with default flags by speed: each the rows of its fastest machine and num_envs.

    Of an agent's rows there, those of the newest commit compete. The fastest row comes first, then the other modes.
    """
    setups = {}
    for kind, cuda in (("CPU", False), ("GPU", True)):
        here = [row for row in rows if row["device"].startswith("cuda") == cuda and row["sps"]]
        here, best = [row for row in here if " " not in row["agent"]], {}  # without flags
        for row in sorted((row for row in here if row["mode"] != "env-only"), key=lambda row: row["started"]):
            old = best.get(row["agent"])
            if not old or row["commit"] != old["commit"] or row["sps"] > old["sps"]:
                best[row["agent"]] = row
        setups[kind] = []
        for row in sorted(best.values(), key=lambda row: -row["sps"]):
            others = [other for other in here if setup(other) == setup(row) and other is not row]
            setups[kind].append([row, *others])
    return {kind: agents for kind, agents in setups.items() if agents}


def setup(row: dict) -> tuple:
    """What rows have in common that differ in their mode only."""
    return row["machine"], row["agent"], row["env_id"], row["num_envs"]


def newest_batch(runs: list[dict]) -> dict[int, dict]:
    """The runs to show of one agent, environment and settings, by seed: those of the newest commit.

    An older commit's are added if they have other seeds: then the newer one went on with the older one's batch. A
    commit that trains a seed again starts a batch of its own.
    """
    commits = {}
    for run in sorted(runs, key=lambda run: run["date"] or ""):
        commits.setdefault((run["commit"], run["dirty"]), {})[run["seed"]] = run
    batch = {}
    for seeds in sorted(commits.values(), key=lambda seeds: max(run["date"] or "" for run in seeds.values())):
        batch = seeds if batch.keys() & seeds.keys() else batch | seeds
    return batch


def summarise_learning(records: list[dict], published: list[dict]) -> list[dict]:
    """One row for each environment, agent, settings other than the default, and length, in this order."""
    groups = {}
    for record in records:
        settings = {name: value for name, value in record["args"].items() if name not in NEUTRAL}
        text = ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
        length = record["args"].get("total_timesteps", 0)  # 0 is the agent's default
        groups.setdefault((record["env_id"], record["agent"], text, length), []).append(record)
    rows, marks = [], {}
    for (env_id, agent, settings, _), group in sorted(groups.items()):
        batch = newest_batch(group)
        runs = [run for _, run in sorted(batch.items()) if "failed" not in run and run["stopped_by"] is None]
        scores = np.array([run["eval_return_mean"] for run in runs if run["eval_return_mean"] is not None])
        figures = [figure for figure in published if figure["agent"] == agent]
        figures = [figure for figure in figures if base_name(figure["env_id"]) == base_name(env_id)]
        rows.append({
            "env_id": env_id, "agent": agent, "settings": settings, "runs": runs, "missing": len(batch) - len(runs),
            "mark": f" ({marks.setdefault(settings, len(marks) + 1)})" if settings else "",
            "steps": max((run["global_step"] for run in runs), default=0),
            "score": float(iqm(scores)) if len(scores) else None,
            "interval": interval(scores[None]).tolist() if len(scores) > 1 else None,
            "minutes": float(np.median([run["wall_seconds"] for run in runs])) / 60 if runs else None,
            "published": max(figures, key=lambda figure: figure["mean"], default=None),
        })  # fmt: skip
    return rows


def newest_peers(records: list[dict]) -> list[dict]:
    """One row for each machine, comparison, peer and mode: the newest that was measured, the newest of all last."""
    rows = {}
    for record in records:
        for mode, ratios in record.get("ratios", {}).items():
            peer = record.get("peer_name") or next(iter(record["sps"]))
            row = {name: record[name] for name in ("comparison", "agent", "peer", "peer_settings", "commit", "date")}
            row |= {"machine": machine(record), "mode": mode, "ratios": ratios, "ratio": median(ratios)}
            row |= {"ours": median(record["sps"][mode]), "theirs": median(record["sps"][peer])}
            key = row["machine"], row["comparison"], peer, mode
            rows.pop(key, None)
            rows[key] = row
    return [*rows.values()]


def over_sb3(rows: list[dict]) -> list[dict]:
    """Of each comparison with Stable-Baselines3 under equal settings, the fastest mode on the newest machine."""
    best = {}
    for row in rows:
        if row["peer"].startswith("stable-baselines3") and not row["comparison"].endswith(UNEQUAL):
            old = best.get(row["comparison"])
            if not old or row["machine"] != old["machine"] or row["ratio"] > old["ratio"]:
                best[row["comparison"]] = row
    return [*best.values()]


def describe_agents(folder: Path) -> list[dict]:
    """Name and default environment of every agent, the latter from its Args."""
    agents = []
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError as error:
            fail(f"{path}, line {error.lineno}: {error.msg}")
        fields = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value]
        env_ids = [ast.literal_eval(node.value) for node in fields if getattr(node.target, "id", "") == "env_id"]
        agents.append({"agent": path.stem, "env_id": env_ids[0] if env_ids else None})
    return agents


# ---- statistics ------------------------------------------------------------------------------------------------------


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


def smooth(curve: dict) -> np.ndarray:
    """The returns of a curve, each the mean of the points in the last 1/SMOOTH of the run's steps."""
    steps, returns = np.array(curve["global_step"]), np.array(curve["episodic_return"])
    window = steps[-1] / SMOOTH
    return np.array([returns[(steps > step - window) & (steps <= step)].mean() for step in steps])


def align(curves: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """POINTS steps that all curves reach, the median seconds until there, and the smoothed returns [runs, POINTS]."""
    first, last = max(curve["global_step"][0] for curve in curves), min(curve["global_step"][-1] for curve in curves)
    steps = np.linspace(first, last, POINTS)
    seconds = [np.interp(steps, curve["global_step"], curve["wall_seconds"]) for curve in curves]
    returns = [np.interp(steps, curve["global_step"], smooth(curve)) for curve in curves]
    return steps, np.median(seconds, axis=0), np.array(returns)


def curves(row: dict) -> list[dict]:
    """The curves of a row's runs, without the empty ones."""
    return [run["curve"] for run in row["runs"] if run["curve"]["global_step"]]


def with_curve(row: dict) -> dict:
    """The row with the curve to draw: steps, seconds, the IQM of the seeds, and its interval if there are several."""
    steps, seconds, returns = align(curves(row))
    band = interval(returns[None], repeats=500) if len(returns) > 1 else None
    return row | {"curve": (steps, seconds, iqm(returns.T), band)}


def base_name(env_id: str) -> str:
    """An environment's name without what differs between its versions: PongNoFrameskip-v4, Pong-v5 -> Pong."""
    return re.sub(r"(NoFrameskip)?-v\d+$", "", env_id)
