"""Tables and plots from benchmarks/results.jsonl, which benchmarks/fps.py fills on one machine or several.

    python benchmarks/report.py            # write README.md, benchmarks/README.md and benchmarks/plots/
    python benchmarks/report.py --check    # write nothing; status 1 if they are not what it would write

Tables go between the markers `<!-- fps:begin -->` and `<!-- fps:end -->`, and replace what is there. A configuration
shows the runs of its newest call of fps.py on each machine: medians, with the smallest and the largest value.
"""

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- fps:begin -->", "<!-- fps:end -->"
COLORS = {"env-only": "black", "eager": "tab:gray", "compile": "tab:blue", "cudagraphs": "tab:orange",
          "compile-cudagraphs": "tab:green"}  # fmt: skip
MODES = [*COLORS]
SHARES = {"environments": "yellowgreen", "acting and copying": "skyblue", "learning": "sandybrown", "rest": "lightgray"}
REQUIRED = ("started", "agent", "mode", "num_envs", "device", "cpu", "cores", "gpu", "gpu_power_limit_watts")
PAGE = f"""# Benchmarks

## Speed

How fast the agents run, on which machine, and how far that is from what the environments alone can do.
`python benchmarks/fps.py --suite quick` measures a machine, `--suite gpu` one with a GPU; each run adds a line to
[results.jsonl](results.jsonl), from which `python benchmarks/report.py` makes this section's tables and plots.

{BEGIN}
{END}

## Learning

What the agents score, after how many steps and how much time. `python benchmarks/learning.py --agents ppo` trains one
with five seeds and fills this section; each run is a line of [learning/](learning). Speed records, and what did not
make one: [RECORDS.md](RECORDS.md).

<!-- learning:begin -->
<!-- learning:end -->
"""


@dataclass
class Args:
    check: bool = False
    """write nothing; end with status 1 if a file is not what would be written"""
    root: Path = ROOT
    """folder with README.md and benchmarks/"""


# ---- results ---------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    """The records of a results file; ends with a sentence about the first line that is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        fail(f"{path}: {error.strerror}; benchmarks/fps.py makes it")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = [key for key in REQUIRED if key not in record]
            if "failed" not in record and not isinstance(record.get("sps"), float):
                missing.append("sps")
        except (ValueError, TypeError, AttributeError):
            fail(f"{path}, line {number}: is not a record in JSON: {line[:60]!r}")
        if missing:
            fail(f"{path}, line {number}: is a record without {', '.join(missing)}")
        if record["mode"] not in MODES:
            fail(f"{path}, line {number}: has the mode {record['mode']!r}, which is none of {', '.join(MODES)}")
        records.append(record)
    return records or fail(f"{path}: no measurements yet; benchmarks/fps.py makes them")


def machine(record: dict) -> str:
    """The machine's name: its processor and, for runs on a GPU, that GPU."""
    cpu = re.sub(r"\((R|TM)\)| CPU| Processor| @.*| \d+-Core", "", record["cpu"])
    cpu = f"{cpu.strip()}, {record['cores']} core{'s' * (record['cores'] > 1)}"
    if not record["device"].startswith("cuda"):
        return cpu
    watts = f" {record['gpu_power_limit_watts']:.0f} W" if record["gpu_power_limit_watts"] else ""
    return f"{record['gpu']}{watts} + {cpu}"


def summarise(records: list[dict]) -> list[dict]:
    """One row per machine, agent, flags, environment, num_envs and mode, in this order, of its newest call of fps.py.

    Speeds are in steps per second, compile times in seconds, memory in MiB; None where nothing was measured.
    """

    def place(record):
        flags = record.get("agent_flags", "")
        where = machine(record), record["agent"], flags, record.get("env_id") or "", record["num_envs"] or 0
        return *where, MODES.index(record["mode"])

    groups = {}
    for record in records:
        groups.setdefault(place(record), []).append(record)
    rows = {}
    for key in sorted(groups):
        newest = max(run["started"] for run in groups[key])
        rows[key] = {"machine": key[0]} | summarise_runs([run for run in groups[key] if run["started"] == newest])
    for key, row in rows.items():  # only what took turns is compared
        for name, mode in (("env_only_sps", "env-only"), ("eager_sps", "eager")):
            other = rows.get((*key[:-1], MODES.index(mode)))
            row[name] = other["sps"] if other and other["started"] == row["started"] else None
    return [*rows.values()]


def summarise_runs(runs: list[dict]) -> dict:
    """The row of one configuration: what its runs share, and medians of what they measured."""

    def values(name):
        return [run[name] for run in runs if run.get(name) is not None]

    def compile_seconds(cache):
        return [run["compile_seconds"] for run in runs if run.get("cache") == cache and "compile_seconds" in run]

    row = {"agent": f"{runs[-1]['agent']} {runs[-1].get('agent_flags', '')}".strip()}
    shared = ("env_id", "frame_skip", "num_envs", "mode", "started", "commit", "dirty", "torch", "cuda",
              "driver", "envpool")  # fmt: skip
    measured = ("sps", "sps_rollout", "sps_update", "host_memory_mib", "device_memory_mib")
    row |= {name: runs[-1].get(name) for name in shared} | {name: median(values(name) or [None]) for name in measured}
    if "compile" in row["mode"] or "graphs" in row["mode"]:
        row |= {cache: median(compile_seconds(cache) or [None]) for cache in ("cold", "warm")}
    speeds = values("sps")
    row |= {"low": min(speeds, default=None), "high": max(speeds, default=None), "runs": len(speeds)}
    return row | {"failed": "; ".join(values("failed"))}


def fastest(rows: list[dict]) -> list[dict]:
    """Of every agent and environment on every machine, the row with the most steps per second."""
    best = {}
    for row in rows:
        key = row["agent"], row["env_id"], row["machine"]
        if row["mode"] != "env-only" and row["sps"] and row["sps"] > best.get(key, {"sps": 0})["sps"]:
            best[key] = row
    return [best[key] for key in sorted(best)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A markdown table, padded so that it can be read as it is; columns of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    right = [all(re.match(r"-?\d|–|failed", cell) for cell in column) for column in zip(*cells)]

    def line(cells):
        return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)) + " |"

    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right)]
    return "\n".join(map(line, [header, rule, *cells]))


def number(value, form: str = ",.0f", divisor=1) -> str:
    """`value / divisor` in a format, or a dash if either is missing."""
    return f"{value / divisor:{form}}" if value is not None and divisor else "–"


def speed(row: dict) -> str:
    """Median and range of a row's SPS, or why there is none."""
    spread = f" ({number(row['low'])}–{number(row['high'])})" if row["runs"] > 1 else ""
    return "; ".join(filter(None, [number(row["sps"]) + spread if row["sps"] else "", row["failed"] and
                                   "failed: " + row["failed"].replace("|", "/")]))  # fmt: skip


def frames(row: dict) -> str:
    """Frames per second of a row, or a dash where an agent's step is one of the game."""
    return number(row["sps"] and row["sps"] * row["frame_skip"]) if (row["frame_skip"] or 1) > 1 else "–"


def source(row: dict) -> str:
    """Day and commit of a measurement; a + after a commit that the measured code differed from."""
    return f"{row['started'][:10]} {(row['commit'] or 'no commit')[:7]}{'+' * bool(row['dirty'])}"


def short_table(rows: list[dict]) -> str:
    """The fastest configuration of every agent on every machine."""
    header = ["Agent", "Environment", "Machine", "Mode", "num_envs", "SPS (lowest–highest)", "Frames/s", "× eager",
              "Env-only SPS", "Of env-only", "Measured"]  # fmt: skip
    return markdown(header, [
        [row["agent"], row["env_id"], row["machine"], row["mode"], str(row["num_envs"]), speed(row), frames(row),
         number(row["sps"], ".2f", row["eager_sps"]), number(row["env_only_sps"]),
         number(row["sps"], ".0%", row["env_only_sps"]), source(row)] for row in fastest(rows)
    ])  # fmt: skip


def full_table(rows: list[dict]) -> str:
    """Every configuration, a section for each machine."""
    header = ["Agent", "Environment", "num_envs", "Mode", "Runs", "SPS (lowest–highest)", "Frames/s", "× eager",
              "Of env-only", "Rollout SPS", "Update SPS", "Compile s, cold", "warm", "Host GiB", "GPU GiB",
              "Measured"]  # fmt: skip
    sections = []
    for name, group in groupby(rows, lambda row: row["machine"]):
        group = list(group)
        newest = max(group, key=lambda row: row["started"])
        versions = [f"{word} {newest[word]}" for word in ("torch", "cuda", "driver", "envpool") if newest[word]]
        cells = [
            [row["agent"], row["env_id"] or "–", str(row["num_envs"] or "–"), row["mode"], str(row["runs"]), speed(row),
             frames(row), number(row["sps"], ".2f", row["mode"] != "env-only" and row["eager_sps"]),
             number(row["sps"], ".0%", row["mode"] != "env-only" and row["env_only_sps"]), number(row["sps_rollout"]),
             number(row["sps_update"]), number(row.get("cold"), ".1f"), number(row.get("warm"), ".1f"),
             number(row["host_memory_mib"], ".1f", 1024), number(row["device_memory_mib"], ".1f", 1024), source(row)]
            for row in group
        ]  # fmt: skip
        sections.append(f"### {name}\n\n{', '.join(versions)}\n\n{markdown(header, cells)}")
    return "\n\n".join(sections)


# ---- plots -----------------------------------------------------------------------------------------------------------


def panels(rows: list[dict], heights, columns: int = 1, width: float = 10):
    """An empty figure with a row of panels for every agent and environment: [(title, its rows, axes), ...]."""
    from matplotlib.figure import Figure

    agents = {}
    for row in rows:
        agents.setdefault((row["agent"], row["env_id"]), []).append(row)
    tall = [heights(group) for group in agents.values()]
    figure = Figure((width, sum(tall) + 0.6), layout="constrained", dpi=100)
    axes = figure.subplots(len(agents), columns, squeeze=False, height_ratios=tall)
    titles = [f"{agent} on {env_id}" for agent, env_id in agents]
    return figure, list(zip(titles, agents.values(), axes))


def bar_names(axis, names: list[str]) -> None:
    """Name the horizontal bars 0, 1, ... of a panel, the first on top."""
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.spines[["top", "right"]].set_visible(False)


def legend(figure, colors: dict) -> None:
    """Explain colours once for all panels, above them."""
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def plot_devices(rows: list[dict]):
    """Steps per second by machine: bars with the range of the runs, a panel for every agent."""
    best = fastest(rows)
    figure, parts = panels(best, lambda group: 0.9 + 0.6 * len(group))
    for title, group, (axis,) in parts:
        group = sorted(group, key=lambda row: -row["sps"])
        for y, row in enumerate(group):
            error = [[row["sps"] - row["low"]], [row["high"] - row["sps"]]]
            axis.barh(y, row["sps"], 0.6, xerr=error, color=COLORS[row["mode"]], capsize=3)
            share = f", {row['sps'] / row['env_only_sps']:.0%} of env-only" if row["env_only_sps"] else ""
            also = f" = {frames(row)} frames/s" if (row["frame_skip"] or 1) > 1 else ""
            text = f"{row['sps']:,.0f} SPS{also}\n{row['num_envs']} envs{share}"
            axis.annotate(text, (row["high"], y), (6, 0), textcoords="offset points", va="center", fontsize=8)
        bar_names(axis, [wrap(row["machine"]) for row in group])
        axis.set_xlim(0, 1.45 * max(row["high"] for row in group))
        axis.set(title=title, xlabel="agent steps per second (SPS)")
        axis.xaxis.set_major_formatter("{x:,.0f}")
    legend(figure, {mode: color for mode, color in COLORS.items() if mode in {row["mode"] for row in best}})
    return figure


def plot_num_envs(rows: list[dict]):
    """Steps per second against num_envs in every mode, under those of the environments alone."""
    from matplotlib.ticker import LogLocator

    rows = [row for row in rows if row["sps"]]
    machines = sorted({row["machine"] for row in rows})
    figure, parts = panels(rows, lambda _: 3.6, len(machines), 1 + 4.5 * len(machines))
    for title, group, axes in parts:
        for name, axis in zip(machines, axes):
            here = [row for row in group if row["machine"] == name]
            axis.set_visible(bool(here))
            if axis is not axes[0]:
                axis.sharey(axes[0])
            for mode, color in COLORS.items():
                line = [row for row in here if row["mode"] == mode]
                speeds = [row["sps"] for row in line]
                error = [[row["sps"] - row["low"] for row in line], [row["high"] - row["sps"] for row in line]]
                axis.errorbar([row["num_envs"] for row in line], speeds, error, color=color, marker="o", capsize=3,
                              linestyle="--" if mode == "env-only" else "-")  # fmt: skip
            axis.set(title=f"{title}\n{wrap(name)}", xlabel="num_envs", ylabel="agent steps per second (SPS)")
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sizes := sorted({row["num_envs"] for row in group}), sizes)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    legend(figure, COLORS)
    return figure


def plot_iteration(rows: list[dict]):
    """Where the time of an iteration goes: its shares, with the fastest num_envs of every machine."""
    chosen = {(row["machine"], row["agent"], row["env_id"], row["num_envs"]) for row in fastest(rows)}
    shown = [
        row for row in rows
        if row["sps_rollout"] and (row["machine"], row["agent"], row["env_id"], row["num_envs"]) in chosen
    ]  # fmt: skip
    figure, parts = panels(shown, lambda group: 0.9 + 0.6 * len(group))
    for title, group, (axis,) in parts:
        for y, row in enumerate(group):
            left = 0
            for share, color in zip(time_shares(row), SHARES.values()):
                axis.barh(y, 100 * share, 0.6, left, color=color)
                if share > 0.05:
                    axis.text(left + 50 * share, y, f"{share:.0%}", ha="center", va="center")
                left += 100 * share
            axis.text(101, y, f"{1e6 / row['sps']:,.1f} µs a step", va="center")
        bar_names(axis, [f"{wrap(row['machine'])}\n{row['mode']}, {row['num_envs']} envs" for row in group])
        axis.set(title=title, xlabel="% of an iteration's time", xlim=(0, 120), xticks=range(0, 101, 20))
    legend(figure, SHARES)
    return figure


def time_shares(row: dict) -> tuple[float, float, float, float]:
    """Fractions of an iteration's time that go into each of SHARES; of the environments, what they take alone."""
    rollout, learning = 1 / row["sps_rollout"], 1 / row["sps_update"]
    envs = min(rollout, 1 / row["env_only_sps"]) if row["env_only_sps"] else 0
    total = max(1 / row["sps"], rollout + learning)  # three medians, each of its own run
    return envs / total, (rollout - envs) / total, learning / total, 1 - (rollout + learning) / total


def wrap(name: str) -> str:
    """A machine's name on two lines if it has a GPU."""
    return name.replace(" + ", "\n+ ")


# ---- files -----------------------------------------------------------------------------------------------------------


PLOTS = {"sps_by_device.png": plot_devices, "sps_by_num_envs.png": plot_num_envs, "iteration_time.png": plot_iteration}
NOTE = """SPS is agent steps per second over all environments: the median of the runs, with the lowest and the highest.
Frames per second = SPS × frame_skip. "Env-only" is the SPS of the same environments, as many of them and with as many
threads, under random actions: what the agent would reach if acting and learning took no time. A `+` after the commit
marks measured code that differs from it."""


def readme_block(rows: list[dict]) -> str:
    """What goes between the markers of README.md."""
    return f"{short_table(rows)}\n\n{NOTE}\n\n![Steps per second by machine](benchmarks/plots/sps_by_device.png)"


def benchmarks_block(rows: list[dict]) -> str:
    """What goes between the markers of benchmarks/README.md."""
    pictures = [
        "![Steps per second by machine](plots/sps_by_device.png)",
        "![Steps per second against num_envs](plots/sps_by_num_envs.png)",
        "![Where the time of an iteration goes](plots/iteration_time.png)",
    ]
    return "\n\n".join([NOTE, short_table(rows), *pictures, full_table(rows)])


def fill(path: Path, default: str | None, block: str, begin: str = BEGIN, end: str = END) -> bytes:
    """The page at `path`, or `default` if there is none, with `block` between its markers."""
    text = path.read_text() if path.is_file() else default
    if text is None:
        fail(f"{path}: is not there; it needs the lines {begin} and {end}, for the tables to go between")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        fail(f"{path}: needs one line {begin} and after it one line {end}, for the tables to go between")
    return f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}".encode()


def publish(script: str, files: dict[Path, bytes], pictures: dict[Path, tuple[str, Callable]], check: bool) -> int:
    """Write what is out of date, or with `check` only name it and the `script` to run; returns the exit status.

    `files` have their content, `pictures` a digest of what they show and a function that draws the figure:
    matplotlib's files differ from version to version, so one is up to date if it carries the digest.
    """
    stale = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
    for path, (digest, _) in pictures.items():
        if not path.is_file() or digest.encode() not in path.read_bytes():
            stale.append(path)
    if check:
        for path in stale:
            print(f"{path} is out of date: run python benchmarks/{script}", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        if path in pictures:
            digest, draw = pictures[path]
            draw().savefig(picture := io.BytesIO(), metadata={"Software": None, "Source": digest})
            files |= {path: picture.getvalue()}
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[path])
        print(f"wrote {path}")
    return 0


def fail(message: str, status: int = 2):
    """End the process with one sentence on stderr: status 2 for bad input, 1 for a failure while running."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def main(args: Args) -> int:
    """Write what is out of date, or with `check` only name it; returns the exit status."""
    folder, readme = args.root / "benchmarks", args.root / "README.md"
    rows = summarise(read_results(folder / "results.jsonl"))
    files = {
        readme: fill(readme, None, readme_block(rows)),
        folder / "README.md": fill(folder / "README.md", PAGE, benchmarks_block(rows)),
    }
    digest = hashlib.sha256(Path(__file__).read_bytes() + (folder / "results.jsonl").read_bytes()).hexdigest()
    pictures = {folder / "plots" / name: (digest, partial(draw, rows)) for name, draw in PLOTS.items()}
    return publish("report.py", files, pictures, args.check)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ImportError as error:
        fail(f"the plots need matplotlib ({error})", status=1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", status=1)
