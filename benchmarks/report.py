"""Tables and pictures of all results: what README.md, benchmarks/README.md and benchmarks/plots/ show.

    python benchmarks/report.py            # write them
    python benchmarks/report.py --check    # write nothing; status 1 if one of them is out of date

The results are results.jsonl (speed, by fps.py), peers.jsonl (speed beside other libraries, by peers.py),
learning/*.jsonl (scores and curves, by learning.py) and published.json (scores that others publish). A generated part
of a page stands between two lines such as `<!-- fps:begin -->` and `<!-- fps:end -->`; a page gets the parts whose
lines it has. Agents, environments and machines are those of the files: a new one needs no line here. results.py reads
the files, pictures.py draws.
"""

import hashlib
import io
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pictures
import results
import tyro
from results import MODES, fail, summarise

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(__file__).with_name("published.json")
WIDTH = 140  # of a line in a page, addresses of links left out
FOOTNOTES = "¹²³⁴⁵⁶⁷⁸⁹"


@dataclass
class Args:
    check: bool = False
    """write nothing; end with status 1 if a file is not what would be written"""
    root: Path = ROOT
    """folder with README.md, agents/ and benchmarks/"""


# ---- tables ----------------------------------------------------------------------------------------------------------


def visible(text: str) -> int:
    """The length of a text without the addresses of its links."""
    return len(re.sub(r"\]\([^)]*\)", "]", text))


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A markdown table, columns of numbers to the right; padded, unless its lines would be wider than WIDTH."""
    widths = [max(map(visible, column)) for column in zip(header, *cells)]
    right = [all(re.match(r"\[?-?\d|–|failed", cell) for cell in column) for column in zip(*cells)]
    if sum(widths) + 3 * len(widths) + 1 > WIDTH:
        widths = [3] * len(widths)

    def line(cells):
        spaces = [" " * (width - visible(cell)) for cell, width in zip(cells, widths)]
        return "| " + " | ".join(s + c if r else c + s for c, s, r in zip(cells, spaces, right)) + " |"

    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right)]
    return "\n".join(map(line, [header, rule, *cells]))


def notes(marks: dict[str, str]) -> str:
    """What the marks of a table stand for, as a list to go below it."""
    return "".join(f"\n- {mark} `{textwrap.shorten(text, WIDTH - 20)}`" for mark, text in marks.items())


def number(value, form: str = ",.0f", divisor=1) -> str:
    """`value / divisor` in a format, or a dash if either is missing."""
    return f"{value / divisor:{form}}" if value is not None and divisor else "–"


def decimal(value: float | None) -> str:
    """A return with as many decimals as it bears: 20.41, 414.7, 9,635."""
    return "–" if value is None else f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def millions(steps: int) -> str:
    """A number of steps: 2,000, 0.5M, 10M."""
    return f"{round(steps / 1e6, 2):g}M" if steps >= 10_000 else f"{steps:,}"


def seeds(row: dict) -> str:
    """How many seeds came to their end, and how many did not."""
    return f"{len(row['runs'])}" + (f" ({row['missing']} unfinished)" if row["missing"] else "")


def over_published(row: dict) -> str:
    """Score over published score; of two below 0 the other way round, so that above 1 is always the better score."""
    ours, theirs = row["score"], row["published"] and row["published"]["mean"]
    if not ours or not theirs or ours * theirs < 0:
        return "–"
    return f"{ours / theirs if ours > 0 else theirs / ours:.2f}"


def learning_table(rows: list[dict]) -> str:
    """A line for each environment, agent, settings and length; the settings other than the default below."""
    header = ["Environment", "Agent", "Steps", "Seeds", "Minutes", "IQM (95 % interval)", "Published", "Ratio"]
    cells, machines = [], {}
    for row in rows:
        score, figure, theirs = decimal(row["score"]), row["published"], "–"
        if row["interval"]:
            score += f" ({' to '.join(map(decimal, row['interval']))})"
        if figure:
            theirs = f"[{decimal(figure['mean'])} ± {decimal(figure['std'])}]({figure['url']})"
            theirs += f" at {millions(figure['steps'])}"
        where = sorted({machines.setdefault(results.machine(run), len(machines)) for run in row["runs"]})
        minutes = number(row["minutes"], ".1f" if row["minutes"] and row["minutes"] < 10 else ",.0f")
        minutes += "\N{NO-BREAK SPACE}" + "".join(FOOTNOTES[n] for n in where)
        cells.append([row["env_id"], row["agent"] + row["mark"], millions(row["steps"]), seeds(row), minutes, score,
                      theirs, over_published(row)])  # fmt: skip
    if not rows:
        return "No results yet."
    below = "Minutes: the median of the runs' wall-clock, with compilation and final games. "
    below = textwrap.fill(below + " ".join(f"{mark} {name}." for mark, name in zip(FOOTNOTES, machines)), 120)
    marks = {row["mark"].strip(): row["settings"] for row in rows if row["mark"]}
    return f"{markdown(header, cells)}\n\n{below}\n{notes(marks)}".strip()


def peers_table(rows: list[dict]) -> str:
    """A line for each comparison, peer and mode, in a section for each machine."""
    header = ["Comparison", "Agent", "Peer", "Mode", "Ratio of SPS", "Turns", "SPS", "Peer's SPS", "Measured"]
    rows = sorted(rows, key=lambda row: (row["machine"], row["comparison"], row["peer"], MODES.index(row["mode"])))
    sections = []
    for name, group in groupby(rows, lambda row: row["machine"]):
        cells = [
            [row["comparison"], row["agent"], row["peer"].replace("stable-baselines3", "SB3").replace("==", " "),
             row["mode"], f"{row['ratio']:.2f} ({min(row['ratios']):.2f}–{max(row['ratios']):.2f})",
             str(len(row["ratios"])), number(row["ours"]), number(row["theirs"]),
             measured(row["date"], row["commit"], row["commit"].endswith("dirty"))]
            for row in group
        ]  # fmt: skip
        sections.append(f"### Peers on {name}\n\n{markdown(header, cells)}")
    return "\n\n".join(sections) or "No results yet."


def full_table(rows: list[dict]) -> str:
    """Every configuration of fps.py, a section for each machine: a table of speeds and one of costs."""
    speed_header = ["Agent", "Environment", "Envs", "Mode", "Runs", "SPS (lowest–highest)", "× eager", "Of env-only"]
    cost_header = ["Agent", "Envs", "Mode", "Rollout SPS", "Update SPS", "Cold s", "Shared s", "Warm s", "Host GiB",
                   "GPU GiB", "Measured"]  # fmt: skip
    marks, sections = {}, []
    for name in dict.fromkeys(row["machine"] for row in rows):
        here, speeds, costs = [row for row in rows if row["machine"] == name], [], []
        for row in here:
            agent, _, flags = row["agent"].partition(" ")
            agent += f" ({marks.setdefault(flags, len(marks) + 1)})" if flags else ""
            envs, eager, alone = str(row["num_envs"] or "–"), row["eager_sps"], row["env_only_sps"]
            if row["mode"] == "env-only":
                eager = alone = None
            else:
                costs.append([agent, envs, row["mode"], number(row["sps_rollout"]), number(row["sps_update"]),
                              *(number(row[cache], ".1f") for cache in ("cold", "shared", "warm")),
                              number(row["host_memory_mib"], ".1f", 1024),
                              number(row["device_memory_mib"], ".1f", 1024),
                              measured(row["started"], row["commit"], row["dirty"])])  # fmt: skip
            speeds.append([agent, row["env_id"] or "–", envs, row["mode"], str(row["runs"]), speed(row),
                           number(row["sps"], ".2f", eager), number(row["sps"], ".0%", alone)])  # fmt: skip
        newest = max(here, key=lambda row: row["started"])
        versions = [f"{word} {newest[word]}" for word in ("torch", "cuda", "driver", "envpool") if newest[word]]
        tables = [markdown(speed_header, speeds), *([markdown(cost_header, costs)] if costs else [])]
        sections.append("\n\n".join([f"### Speed on {name}", f"{', '.join(versions)}.", *tables]))
    text = "\n\n".join(sections) + "\n" + notes({f"({mark})": flags for flags, mark in marks.items()})
    return text.strip() or "No results yet."


def speed(row: dict) -> str:
    """Median and range of a row's SPS, or why there is none."""
    if not row["sps"]:
        return f"failed: {row['failed'][:70]}".replace("|", "/")
    return number(row["sps"]) + (f" ({number(row['low'])}–{number(row['high'])})" if row["runs"] > 1 else "")


def measured(date: str, commit: str | None, dirty) -> str:
    """Day and commit of a measurement; a + after a commit that the measured code differed from."""
    return f"{date[:10]} {(commit or 'no commit')[:7]}{'+' * bool(dirty)}"


def agents_table(agents: list[dict], learned: list[dict], setups: dict[str, list]) -> str:
    """README's table: every agent's speed and score, by default settings and in the default environment if possible."""
    kinds = ["CPU", *(kind for kind in setups if kind != "CPU")]
    fastest = {kind: {rows[0]["agent"]: rows[0] for rows in setups.get(kind, [])} for kind in kinds}
    machines, cells, star = {}, [], ""
    for about in agents:
        name = about["agent"]
        rows = [row for row in learned if row["agent"] == name and row["score"] is not None]
        env_id = about["env_id"]
        row = max(rows, key=lambda row: (not row["settings"], row["env_id"] == env_id, row["steps"]), default=None)
        result = ["–", "–", "–", "–"]
        if row:
            own, figure = "\\*" * bool(row["settings"]), row["published"]
            star = own or star
            theirs = f"{decimal(figure['mean'])} at {millions(figure['steps'])}" if figure else "–"
            env_id = row["env_id"]
            result = [decimal(row["score"]) + own, millions(row["steps"]), seeds(row), theirs]
        for kind in kinds:
            result.append("–")
            if best := fastest[kind].get(name):
                mark = FOOTNOTES[machines.setdefault(best["machine"], len(machines))]
                result[-1] = f"{number(best['sps'])}\N{NO-BREAK SPACE}{mark}"
        cells.append([f"[{name}](agents/{name}.py)", env_id or "–", *result])
    header = ["Agent", "Environment", "Score", "Steps", "Seeds", "Published"]
    header += [f"SPS, {kind}" for kind in kinds]
    below = ["Score: interquartile mean over the seeds of the return in whole games after training. "
             "SPS: agent steps per second over all copies of the default environment, in the faster mode."]  # fmt: skip
    below += [f"{mark} {name}." for mark, name in zip(FOOTNOTES, machines)]
    below += [f"{star} With [settings of its own](benchmarks/README.md#learning)."] if star else []
    return f"{markdown(header, cells)}\n\n{textwrap.fill(' '.join(below), 120)}" if agents else "No agents yet."


def names(row: dict) -> tuple[str, str]:
    """The algorithm and the environment of a comparison, as prose has them: DQN, Breakout."""
    return row["agent"].split("_")[0].upper(), results.base_name(row["peer_settings"]["env_id"])


def claim(peers: list[dict]) -> str:
    """README's sentence on speed: the ratios over Stable-Baselines3 under equal settings, machine by machine."""
    faster, others = {}, []
    for row in results.over_sb3(peers):
        name, env = names(row)
        if min(row["ratios"]) > 1:
            faster.setdefault(row["machine"], []).append(f"{name} {row['ratio']:.1f} × on {env}")
        else:
            word = "slower" if max(row["ratios"]) < 1 else "as fast"
            others.append((f"{name} on {env} is {word} ({row['ratio']:.1f} ×", row["machine"]))
    if not faster:
        return "No results yet."
    peer = results.over_sb3(peers)[-1]["peer"].replace("stable-baselines3==", "Stable-Baselines3 ")
    text = f"With equal hyperparameters on the same CPU, the agents take more steps a second than {peer}: "
    others = [f"{said})" if {*faster} == {where} else f"{said}, {where})" for said, where in others]
    text += "; ".join([*(f"on {where}, {', '.join(sorted(words))}" for where, words in faster.items()), *others])
    text += ". DQN on Breakout, DDPG, SAC and TD3 step 8 environments, theirs 1."
    text += " On Atari ours compute in bf16, theirs in fp32. Ours ran in eager or compiled mode, whichever was faster."
    text = textwrap.fill(text, 120, break_on_hyphens=False)
    return text + "\n[How it was measured](benchmarks/README.md#peers), [all turns](benchmarks/peers.jsonl)."


# ---- files -----------------------------------------------------------------------------------------------------------


def fill(path: Path, blocks: dict[str, str]) -> bytes:
    """The page at `path` with each block between its markers, where the page has them."""
    text = path.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin in text or end in text:
            if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
                fail(f"{path}: needs one line {begin} and after it one line {end}")
            text = f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}"
    return text.encode()


def collect(root: Path) -> tuple[dict, dict]:
    """All pages with their content, and all pictures with the files that each is made from and what draws it."""
    folder = root / "benchmarks"
    runs, turns, training = folder / "results.jsonl", folder / "peers.jsonl", folder / "learning"
    speeds = summarise(results.read_speeds(runs))
    setups = results.fastest_setups(speeds)
    peers = results.newest_peers(results.read_peers(turns))
    learned = results.summarise_learning(results.read_learning(training), json.loads(PUBLISHED.read_text())["figures"])
    agents = results.describe_agents(root / "agents")
    readme = {"agents": agents_table(agents, learned, setups), "claim": claim(peers)}
    page = {"learning": learning_table(learned), "peers": peers_table(peers), "fps": full_table(speeds)}
    pages = {path: fill(path, blocks) for path, blocks in ((root / "README.md", readme), (folder / "README.md", page))}
    drawn, over = {}, results.over_sb3(peers)
    ratios = {row["agent"]: row["ratio"] for row in over}
    labelled = [(" on ".join(names(row)), row["ratio"]) for row in over]

    def curves() -> list[dict]:  # takes a while, so only where a picture is drawn
        return [results.with_curve(row) for row in learned if results.curves(row)]

    if any(results.curves(row) for row in learned):
        sources = [*sorted(training.glob("*.jsonl")), PUBLISHED]
        drawn["overview.png"] = [*sources, turns], lambda: pictures.plot_overview(curves(), labelled)
        drawn["learning.png"] = sources, lambda: pictures.plot_learning(curves())
    if setups:
        drawn["speed.png"] = [runs, turns], lambda: pictures.plot_speed(setups, ratios)
        drawn["iteration_time.png"] = [runs], lambda: pictures.plot_iteration(setups)
    return pages, {folder / "plots" / name: picture for name, picture in drawn.items()}


def main(args: Args) -> int:
    """Write what is out of date, or with `check` only name it; returns the exit status.

    A picture carries a digest of the files that it is made from: its own bytes differ between versions of matplotlib.
    """
    code = [Path(module.__file__) for module in (pictures, results)]
    pages, drawn = collect(args.root)
    stale = [path for path, content in pages.items() if path.read_bytes() != content]
    for path, (sources, draw) in drawn.items():
        content = b"".join(source.read_bytes() for source in (*code, *sources) if source.is_file())
        digest = hashlib.sha256(content).hexdigest()
        if path.is_file() and digest.encode() in path.read_bytes():
            continue
        stale.append(path)
        if not args.check:
            draw().savefig(file := io.BytesIO(), metadata={"Software": None, "Source": digest})
            pages[path] = file.getvalue()
    for path in stale:
        if args.check:
            print(f"{path} is out of date: run python benchmarks/report.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pages[path])
            print(f"wrote {path}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ImportError as error:
        fail(f"the pictures need matplotlib ({error})", status=1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", status=1)
