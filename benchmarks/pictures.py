"""Pictures of the results, drawn by report.py: each function takes rows that report.py made and returns a figure.

All are 1,000 pixels wide. An agent has one colour and one line style in all panels, so that curves differ in grey, too.
"""

import math

WIDTH = 10  # inches, of 100 pixels
MODES = {"env-only": ("black", "|"), "eager": ("dimgray", "o"), "compile": ("tab:blue", "s"),
         "cudagraphs": ("tab:orange", "^"), "compile-cudagraphs": ("tab:green", "D")}  # fmt: skip
LINES = ["-", "--", "-.", (0, (3, 1)), (0, (4, 1, 1, 1, 1, 1))]  # dotted are the scores that others publish
TIMES = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36000: "10 h"}
OVERVIEW = ("CartPole-v1", "HalfCheetah-v4", "Pong-v5")  # environments in README's picture, where there are curves
SHARES = {"environments": "#1f4e79", "acting and copying": "#6baed6", "learning": "#fdd49e", "rest": "white"}


# ---- learning --------------------------------------------------------------------------------------------------------


def line_styles(rows: list[dict]) -> dict:
    """Colour and line of every agent, the same in all pictures of these rows."""
    import matplotlib

    agents, color = sorted({row["agent"] for row in rows}), matplotlib.colormaps["tab20"]
    # ten colours at even places, lighter ones between them
    return {agent: {"color": color((2 * i + i // 10) % 20), "linestyle": LINES[i % len(LINES)]}
            for i, agent in enumerate(agents)}  # fmt: skip


def plot_learning(rows: list[dict]):
    """A panel for each environment with the curves of all agents, against steps and, below, against wall-clock time.

    A row has a `curve` of steps, seconds, the IQM of the seeds and the ends of its band. Rows with settings other than
    the default are thinner lines with the row's mark, without a band.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    envs, styles = sorted({row["env_id"] for row in rows}), line_styles(rows)
    lines = math.ceil(len(envs) / 3)
    figure = Figure((WIDTH, 4.2 * lines + 0.2 * math.ceil(len(styles) / 4) + 0.3), layout="constrained", dpi=100)
    grid = figure.subplots(2 * lines, 3, squeeze=False)
    for place, axes in enumerate(zip(grid[::2].flat, grid[1::2].flat)):
        if place < len(envs):
            here = [row for row in rows if row["env_id"] == envs[place]]
            draw_curves(axes[0], here, styles)
            draw_curves_in_time(axes[1], here, styles, axes[0].get_ylim())
            axes[0].set_title(envs[place])
        for axis in axes:
            axis.set_visible(place < len(envs))
            axis.set_ylabel("return" if place % 3 == 0 else "")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], label=agent, linewidth=1.8, **style) for agent, style in styles.items()]
    handles.append(Line2D([], [], color="black", linewidth=1, label="(1) … settings of its own"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9, handlelength=3.5)
    return figure


def draw_curve(axis, row: dict, along, styles: dict) -> None:
    """A row's curve and its band along steps or seconds."""
    *_, means, band = row["curve"]
    axis.plot(along, means, linewidth=1.1 if row["settings"] else 1.8, **styles[row["agent"]])
    if band is not None and not row["settings"]:
        axis.fill_between(along, *band, color=styles[row["agent"]]["color"], alpha=0.2, linewidth=0)


def draw_curves(axis, rows: list[dict], styles: dict) -> None:
    """The curves of one environment against steps, with the published scores."""
    from matplotlib.ticker import EngFormatter

    for row in rows:
        steps, _, means, _ = row["curve"]
        draw_curve(axis, row, steps, styles)
        axis.annotate(row["mark"], (steps[-1], means[-1]), fontsize=8, va="center")
    mark_published(axis, {row["agent"]: row["published"]["mean"] for row in rows if row["published"]}, styles)
    axis.set(xlabel="environment steps", xlim=(0, None))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.5M


def draw_curves_in_time(axis, rows: list[dict], styles: dict, ylim: tuple[float, float]) -> None:
    """The same curves against wall-clock time."""
    from matplotlib.ticker import FixedLocator, NullLocator

    for row in rows:
        draw_curve(axis, row, row["curve"][1], styles)
    axis.set(xscale="log", xlabel="wall-clock time", ylim=ylim)
    axis.xaxis.set_major_locator(FixedLocator([*TIMES]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda seconds, _: TIMES.get(round(seconds), ""))


def plot_overview(rows: list[dict], ratios: list[tuple[str, float]]):
    """README's picture: the curves of OVERVIEW and, at the right, how fast agents are beside Stable-Baselines3.

    `rows` are those of plot_learning; `ratios` have a label and a ratio of SPS each.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles, envs = line_styles(rows), [env_id for env_id in OVERVIEW if any(row["env_id"] == env_id for row in rows)]
    figure = Figure((WIDTH, 3.1), layout="constrained", dpi=100)
    *panels, bars = figure.subplots(1, len(envs) + 1, squeeze=False)[0]
    for axis, env_id in zip(panels, envs):
        draw_curves(axis, [row | {"mark": ""} for row in rows if row["env_id"] == env_id], styles)
        axis.set_title(f"{env_id}, return", fontsize=10)
        axis.grid(alpha=0.3)
    bars.barh(range(len(ratios)), [ratio for _, ratio in ratios], 0.6, color="tab:blue")
    for y, (_, ratio) in enumerate(ratios):
        bars.text(max(1, ratio), y, f" {ratio:.1f} ×", va="center", fontsize=8)
    bars.axvline(1, color="black", linewidth=1)
    bars.set_yticks(range(len(ratios)), [label for label, _ in ratios], fontsize=8)
    bars.set(xlim=(0, 1.25 * max([1, *(ratio for _, ratio in ratios)])), ylim=(len(ratios) - 0.5, -0.5))
    bars.set_title("steps a second over SB3", fontsize=10)
    for axis in (*panels, bars):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    shown = sorted({row["agent"] for row in rows if row["env_id"] in envs})
    handles = [Line2D([], [], label=agent, linewidth=1.8, **styles[agent]) for agent in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8, handlelength=3.5)
    return figure


def mark_published(axis, figures: dict[str, float], styles: dict) -> None:
    """Dotted lines at the scores that others publish; those that lie close together share a label."""
    for agent, mean in figures.items():
        axis.axhline(mean, color=styles[agent]["color"], linestyle=":", linewidth=1)
    low, high = axis.get_ylim()
    near, groups = 0.12 * (high - low), []
    for agent, mean in sorted(figures.items(), key=lambda item: item[1]):
        if groups and mean - groups[-1][-1][1] < near:
            groups[-1].append((agent, mean))
        else:
            groups.append([(agent, mean)])
    axis.set_ylim(low, high + near)
    for group in groups:
        place = group[-1][1] if group[-1][1] < high - near else high - 0.3 * near  # near the top: above the curves
        ends = [f"{mean:,.4g}" if abs(mean) < 1e4 else f"{mean:,.0f}" for _, mean in (group[0], group[-1])]
        scores = " to ".join(dict.fromkeys(ends))
        color = styles[group[0][0]]["color"] if len(group) == 1 else "black"
        axis.annotate(f"published {scores}", (0.02, place), (0, 1), fontsize=8, color=color, va="bottom",
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})  # fmt: skip


# ---- speed -----------------------------------------------------------------------------------------------------------


def plot_speed(setups: dict[str, list[list[dict]]], ratios: dict[str, float]):
    """Steps per second of every agent: a mark for each mode, the environments' ceiling, and the ratio over SB3.

    `setups` has for CPU and GPU a list of agents, each the rows of one setup, fastest first; `ratios` are by agent.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heights = [len(agents) + 2 for agents in setups.values()]
    figure = Figure((WIDTH, 0.42 * sum(heights) + 0.4), layout="constrained", dpi=100)
    panels = figure.subplots(len(setups), 1, squeeze=False, height_ratios=heights)[:, 0]
    used = set()
    for axis, (kind, agents) in zip(panels, setups.items()):
        machines = {rows[0]["machine"] for rows in agents}
        for y, rows in enumerate(agents):
            axis.plot([row["sps"] for row in rows], [y] * len(rows), color="lightgray", zorder=1)
            for row in rows:
                color, marker = MODES[row["mode"]]
                inside = "white" if row["mode"] == "eager" else color
                axis.plot(row["sps"], y, marker, color=color, markerfacecolor=inside, markeredgewidth=2,
                          markersize=5 + 5 * (row["mode"] in ("env-only", "eager")))  # fmt: skip
                used.add(row["mode"])
            texts = [f"{rows[0]['sps']:,.0f} SPS"]
            if kind == "CPU" and rows[0]["agent"] in ratios:
                texts.append(f"{ratios[rows[0]['agent']]:.1f} × SB3")
            for x, text in zip((1.02, 1.14), texts):
                axis.text(x, y, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
        names = [f"{row['agent']}\n{row['env_id']}, {row['num_envs']} envs" for row, *_ in agents]
        if len(machines) > 1:
            names = [f"{name}, {row['machine']}" for name, (row, *_) in zip(names, agents)]
        where = f", {machines.pop()}" if len(machines) == 1 else f" on a {kind}"
        axis.set_yticks(range(len(agents)), names, fontsize=8)
        axis.set(xscale="log", ylim=(len(agents) - 0.4, -0.6), xlabel=f"agent steps per second (SPS){where}")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = []
    for mode in (mode for mode in MODES if mode in used):
        name, inside = "environments alone" if mode == "env-only" else mode, "white" if mode == "eager" else None
        handles.append(Line2D([], [], color=MODES[mode][0], marker=MODES[mode][1], markerfacecolor=inside,
                              linestyle="", markeredgewidth=2, markersize=9, label=name))  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def plot_iteration(setups: dict[str, list[list[dict]]]):
    """Where the time of an iteration goes, for every agent and mode that plot_speed shows."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [row for agents in setups.values() for rows in agents for row in rows if row["sps_rollout"]]
    figure = Figure((WIDTH, 0.3 * len(shown) + 1.2), layout="constrained", dpi=100)
    axis = figure.subplots()
    for y, row in enumerate(shown):
        left = 0
        for share, (name, color) in zip(time_shares(row), SHARES.items()):
            axis.barh(y, 100 * share, 0.7, left, color=color, edgecolor="gray", linewidth=0.5)
            if share > 0.05:
                dark = "white" if name == "environments" else "black"
                axis.text(left + 50 * share, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=dark)
            left += 100 * share
        axis.text(101, y, f"{1e6 / row['sps']:,.1f} µs a step", va="center", fontsize=8)
    axis.set_yticks(range(len(shown)), [f"{row['agent']}, {row['mode']}" for row in shown], fontsize=8)
    axis.set(xlabel="% of an iteration's time", xlim=(0, 100), xticks=range(0, 101, 20), ylim=(len(shown) - 0.4, -0.6))
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(facecolor=color, edgecolor="gray", label=name) for name, color in SHARES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def time_shares(row: dict) -> tuple[float, float, float, float]:
    """Fractions of an iteration's time that go into each of SHARES; of the environments, what they take alone."""
    rollout, learning = 1 / row["sps_rollout"], 1 / row["sps_update"]
    envs = min(rollout, 1 / row["env_only_sps"]) if row["env_only_sps"] else 0
    total = max(1 / row["sps"], rollout + learning)  # three medians, each of its own run
    return envs / total, (rollout - envs) / total, learning / total, 1 - (rollout + learning) / total
