"""benchmarks/report.py: rows and tables from results, made up ones here (tests/test_docs.py has the committed ones)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT / "benchmarks"))

import pictures  # noqa: E402
import report  # noqa: E402
from results import (  # noqa: E402
    align,
    fastest_setups,
    interval,
    iqm,
    newest_batch,
    newest_peers,
    read_peers,
    read_speeds,
    smooth,
    summarise_learning,
)

PAGE = "before\n<!-- {0}:begin -->\nold\n<!-- {0}:end -->\nafter\n"


@pytest.fixture
def project(tmp_path):
    """A folder with measurements, an agent, and two pages that wait for their tables."""
    (tmp_path / "benchmarks/learning").mkdir(parents=True)
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents/ppo.py").write_text(
        '"""Policy (PPO), of a kind. A paper\n\nmore"""\nclass Args:\n    env_id: str = "A-v1"\n'
    )
    (tmp_path / "benchmarks/results.jsonl").write_bytes((DATA / "fps_results.jsonl").read_bytes())
    write_lines(tmp_path / "benchmarks/learning/ppo.jsonl", [run(seed, 10.0 * seed) for seed in (1, 2, 3)])
    write_lines(tmp_path / "benchmarks/peers.jsonl", [turns("fast", [2.0, 4.0, 3.0])])
    (tmp_path / "README.md").write_text(PAGE.format("agents") + PAGE.format("claim"))
    (tmp_path / "benchmarks/README.md").write_text("".join(map(PAGE.format, ("learning", "peers", "fps"))))
    return tmp_path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(seed, score, **changes):
    """A record of learning.py, of a run whose return rises in a line to its score."""
    curve = {"global_step": [*range(100, 2100, 100)], "wall_seconds": [*range(1, 21)]}
    curve |= {"episodic_return": [score * i / 20 for i in range(1, 21)]}
    values = {"agent": "ppo", "env_id": "A-v1", "seed": seed, "args": {}, "device": "cpu", "gpu": None, "mode": "eager"}
    values |= {"cpu": "AMD EPYC 7763 64-Core Processor", "cores": 2, "commit": "0123456789", "dirty": False}
    values |= {"date": "2026-01-02T00:00:00+00:00", "stopped_by": None, "global_step": 2000, "curve": curve}
    return values | {"eval_return_mean": score, "wall_seconds": 20.0} | changes


def turns(comparison, ratios, **changes):
    """A record of peers.py."""
    values = {"comparison": comparison, "agent": "ppo", "peer_name": "sb3", "peer": "stable-baselines3==2.9.2"}
    values |= {"cpu": "CPU", "cores": 2, "commit": "abcdef0", "date": "2026-01-02", "peer_settings": {"env_id": "B-v1"}}
    values |= {"sps": {"sb3": [100.0], "eager": [100 * ratio for ratio in ratios]}, "ratios": {"eager": ratios}}
    return values | changes


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_summary_of_runs():
    rows = report.summarise(read_speeds(DATA / "fps_results.jsonl"))
    (compiled,) = (row for row in rows if (row["agent"], row["mode"]) == ("ppo", "compile"))
    assert (compiled["sps"], compiled["low"], compiled["high"], compiled["runs"]) == (40_000, 36_000, 44_000, 3)
    assert (compiled["cold"], compiled["warm"], compiled["eager_sps"], compiled["env_only_sps"]) == (30, 5, 2e4, 5e5)
    # 1/40,000 s a step: 1/80,000 of it in the rollout, of which 1/500,000 in the environments, the rest in the update
    assert pictures.time_shares(compiled) == pytest.approx((0.08, 0.42, 0.5, 0))


def speeds(*changes):
    """Rows of fps.py's runs that differ from the first one in the data."""
    base = json.loads((DATA / "fps_results.jsonl").read_text().splitlines()[0])
    return report.summarise([base | change for change in changes])


def test_only_the_newest_call_counts():
    """And a comparison is only made within one call."""
    old, new = {"eager": 10.0, "env-only": 100.0}, {"eager": 20.0}
    env_only, eager = speeds(*({"started": day, "mode": mode, "sps": sps}
                               for day, runs in (("2026-02-02", new), ("2026-01-01", old))
                               for mode, sps in runs.items()))  # fmt: skip
    assert (eager["sps"], eager["runs"], eager["eager_sps"], eager["env_only_sps"]) == (20, 1, 20, None)
    assert env_only["sps"] == 100


def test_flags_of_the_agents_make_another_configuration():
    rows = speeds({"sps": 1.0}, {"sps": 2.0, "agent_flags": "--num-steps 16"})
    assert [(row["agent"], row["sps"]) for row in rows] == [("ppo", 1), ("ppo --num-steps 16", 2)]
    table = report.full_table(rows).splitlines()
    assert table[-1] == "- (1) `--num-steps 16`" and any(line.startswith("| ppo (1) ") for line in table)
    assert [rows[0]["sps"] for rows in fastest_setups(rows)["CPU"]] == [1]


def test_the_fastest_setup_is_of_the_newest_commit():
    rows = speeds(
        {"sps": 9.0, "commit": "old", "started": "2026-01-01", "num_envs": 64},
        {"sps": 1.0, "commit": "new", "started": "2026-01-02", "num_envs": 8},
        {"sps": 2.0, "commit": "new", "started": "2026-01-03", "num_envs": 32},
        {"sps": 7.0, "commit": "new", "started": "2026-01-03", "num_envs": 32, "mode": "env-only"},
        {"sps": 1.5, "commit": "new", "started": "2026-01-04", "num_envs": 16},
        {"sps": 4.0, "device": "cuda", "gpu": "H100", "mode": "cudagraphs"},
    )
    setups = fastest_setups(rows)
    assert [[(row["mode"], row["sps"]) for row in rows] for rows in setups["CPU"]] == [[("eager", 2), ("env-only", 7)]]
    assert [[row["sps"] for row in rows] for rows in setups["GPU"]] == [[4]]


def test_speed_tables_are_the_golden_ones():
    rows = report.summarise(read_speeds(DATA / "fps_results.jsonl"))
    assert report.full_table(rows) + "\n" == (DATA / "fps_report.md").read_text()


def test_interquartile_mean():
    assert iqm(np.array([8, 1, 7, 2, 6, 3, 5, 4])) == 4.5  # of 3, 4, 5, 6
    assert iqm(np.array([0, 100, 1, 3, 2])) == 2  # of 1, 2, 3
    assert iqm(np.array([0, 1, 5])) == 2  # a quarter of three is no whole score
    assert iqm(np.array([[0, 9, 1, 2], [4, 4, 0, 9]])).tolist() == [1.5, 4]


def test_bootstrap_interval():
    """Two runs that score 0 and 1 have samples of mean 0, 1/2, 1/2 and 1; drawing never mixes tasks."""
    runs = np.array([[0.0, 1.0]])
    assert interval(runs).tolist() == [0, 1]
    assert interval(runs, level=0.4).tolist() == [0.5, 0.5] and interval(runs, level=0.6).tolist() == [0, 1]
    tasks = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert interval(tasks).tolist() == [2, 2]
    curves = np.array([[[0.0, 5.0], [1.0, 5.0]]])
    assert interval(curves).T.tolist() == [[0, 1], [5, 5]]


def test_curves_are_smoothed_and_meet_where_all_have_points():
    curve = {"global_step": [*range(1, 101)], "episodic_return": [0] * 50 + [10] * 50}
    assert smooth(curve)[49:56].tolist() == [0, 2, 4, 6, 8, 10, 10]  # over 5 steps
    curves = [{"global_step": [100, 300], "wall_seconds": [1, 3], "episodic_return": [0, 2]},
              {"global_step": [200, 400], "wall_seconds": [5, 9], "episodic_return": [10, 14]}]  # fmt: skip
    steps, seconds, returns = align(curves)
    assert (steps[0], steps[-1], seconds[0], seconds[-1]) == (200, 300, 3.5, 5)
    assert (returns[:, 0].tolist(), returns[:, -1].tolist()) == ([1, 10], [2, 12])


def batch(*runs):
    """Seeds and commits of the runs that count; `runs` are seed, commit and day."""
    records = [run(seed, 1.0, commit=commit, date=f"2026-01-{day:02}") for seed, commit, day in runs]
    return {seed: record["commit"] for seed, record in newest_batch(records).items()}


def test_the_newest_commit_counts():
    assert batch((1, "b", 3), (1, "a", 1), (2, "a", 2), (3, "a", 2)) == {1: "b"}
    assert batch((1, "a", 1), (2, "b", 2), (3, "b", 3)) == {1: "a", 2: "b", 3: "b"}  # the batch went on
    assert batch((1, "a", 1), (2, "a", 2), (3, "b", 3), (1, "b", 4)) == {3: "b", 1: "b"}  # out of turn
    assert batch((1, "a", 1), (1, "a", 2), (2, "a", 1)) == {1: "a", 2: "a"}


PUBLISHED = [
    {
        "agent": "ppo",
        "env_id": "PongNoFrameskip-v4",
        "steps": 10**7,
        "mean": 20.0,
        "std": 0.2,
        "source": "A x",
        "url": "u",
    },
    {"agent": "ppo", "env_id": "Pong-v5", "steps": 10**7, "mean": 16.0, "std": 0.2, "source": "A y", "url": "v"},
    {"agent": "ppo", "env_id": "Acrobot-v1", "steps": 500_000, "mean": -84.0, "std": 1, "source": "B", "url": "w"},
    {"agent": "dqn", "env_id": "Pong-v5", "steps": 1, "mean": 1, "std": 0, "source": "C", "url": "x"},
]


def test_learning_table():
    records = [run(seed, float(seed), env_id="Pong-v5", wall_seconds=seed * 60.0) for seed in (5, 4, 3, 2, 1)]
    records[0] |= {"cores": 1, "wall_seconds": 9000.0}
    records += [run(6, 0.0, env_id="Pong-v5", failed="died"), run(7, 99.0, env_id="Pong-v5", stopped_by="SIGTERM")]
    records += [run(1, -80.0, env_id="Acrobot-v1", args={"lr": 0.1, "total_timesteps": 9, "mode": "eager"})]
    rows = summarise_learning(records, PUBLISHED)
    lines = report.learning_table(rows).splitlines()
    low, high = interval(np.array([[1.0, 2, 3, 4, 5]]))
    assert [cells(line) for line in lines[2:4]] == [
        ["Acrobot-v1", "ppo (1)", "2,000", "1", "0.3\xa0¹", "-80.00", "[-84.00 ± 1.00](w) at 0.5M", "1.05"],
        ["Pong-v5", "ppo", "2,000", "5 (2 unfinished)", "3.0\xa0¹²", f"3.00 ({low:.2f} to {high:.2f})",
         "[20.00 ± 0.20](u) at 10M", "0.15"],
    ]  # fmt: skip
    below = "Minutes: the median of the runs' wall-clock, with compilation and final games. "
    below += "¹ AMD EPYC 7763, 2 cores. ² AMD EPYC 7763, 1 core."
    assert lines[4] == "" and " ".join(lines[5:7]) == below
    assert lines[7:] == ["", "- (1) `lr=0.1`"]


def test_published_json():
    figures = json.loads(report.PUBLISHED.read_text())["figures"]
    keys = [(figure["agent"], figure["env_id"], figure["source"]) for figure in figures]
    assert len(keys) == len({*keys}) and all(figure["steps"] >= 500_000 for figure in figures)
    assert all(figure["url"].startswith("https://") for figure in figures)


def test_the_newest_turns_of_each_machine_count(tmp_path):
    results = tmp_path / "peers.jsonl"
    old = turns("fast", [9.0])
    del old["peer_name"]  # as before there were several peers
    write_lines(results, [
        old, turns("fast", [2.0, 4.0, 3.0]), turns("fast", [2.5], cores=1), turns("fast-bf16", [8.0]),
        turns("other", [1.1, 0.9, 1.2], commit="abcdef0-dirty"), turns("fast", [0.0]) | {"failed": "x", "ratios": {}},
    ])  # fmt: skip
    rows = newest_peers(read_peers(results))
    table = report.peers_table(rows)
    assert table.count("### Peers on CPU, ") == 2 and "9.00" not in table
    assert cells(next(line for line in table.splitlines() if "(2.00–4.00)" in line)) == [
        "fast", "ppo", "SB3 2.9.2", "eager", "3.00 (2.00–4.00)", "3", "300", "100", "2026-01-02 abcdef0"]  # fmt: skip
    assert "2026-01-02 abcdef0+ |" in table
    claim = " ".join(report.claim(rows).split())
    assert (
        "than Stable-Baselines3 2.9.2: on CPU, 1 core, PPO 2.5 × on B; PPO on B is as fast (1.1 ×, CPU, 2 cores)."
        in claim
    )


def test_agents_table(project):
    (project / "agents/dqn_new.py").write_text(
        '"""A thing, with a name that is too long for the table, new. Paper"""\n'
    )
    assert report.main(report.Args(root=project)) == 0
    lines = (project / "README.md").read_text().splitlines()
    dqn, ppo = (cells(line) for line in lines if line.startswith("| ["))
    gpu = ["–", "–"]
    assert dqn == ["[dqn_new](agents/dqn_new.py)", "–", "–", "–", "–", "–", *gpu]
    assert ppo == ["[ppo](agents/ppo.py)", "A-v1", "20.00", "2,000", "3", "–", "40,000\N{NO-BREAK SPACE}¹", "–"]
    assert any("¹ AMD EPYC 7763, 2 cores." in line for line in lines)
    results = project / "benchmarks/learning/ppo.jsonl"
    own, elsewhere = run(1, 5.0, args={"lr": 1}), run(1, 7.0, env_id="C-v1")
    for runs, shown in [
        ([own, run(1, 7.0, env_id="C-v1", args={"lr": 1}, global_step=3000)], "| 5.00\\* |"),  # its own environment
        ([own, elsewhere], "| C-v1 "),  # its default settings, in another one
        ([elsewhere], "| C-v1 "),
        ([run(1, 6.0, args={"checkpoint_buffer": "always"})], " 6.00 |"),  # no setting of its own
        ([run(1, 8.0), run(1, 9.0, args={"total_timesteps": 500}, global_step=500)], " 8.00 |"),  # the longest
    ]:
        write_lines(results, runs)
        report.main(report.Args(root=project))
        assert shown in (project / "README.md").read_text()
    (project / "agents/broken.py").write_text("def (")
    with pytest.raises(SystemExit):
        report.main(report.Args(root=project))


def test_wide_tables_are_not_padded():
    narrow = report.markdown(["a", "b"], [["[long](address)", "1"], ["x", "20"]])
    assert narrow.splitlines()[2:] == ["| [long](address) |  1 |", "| x      | 20 |"]
    wide = report.markdown(["a", "b"], [["x" * 100, "1"], ["y", "z" * 60]])
    assert wide.splitlines()[-1] == f"| y   | {'z' * 60} |"


def test_writes_checks_and_writes_again(project, capsys):
    assert report.main(report.Args(check=True, root=project)) == 1
    assert report.main(report.Args(root=project)) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("before\n<!-- agents:begin -->\n| Agent") and text.endswith("<!-- claim:end -->\nafter\n")
    assert "\nold\n" not in text + (project / "benchmarks/README.md").read_text()
    assert (DATA / "fps_report.md").read_text() in (project / "benchmarks/README.md").read_text()
    written = contents(project)
    drawn = [path for path, content in written.items() if content.startswith(b"\x89PNG")]
    assert {path.name for path in drawn} == {"learning.png", "overview.png", "speed.png", "iteration_time.png"}

    assert report.main(report.Args(check=True, root=project)) == 0
    for path in drawn:
        path.unlink()
    assert report.main(report.Args(root=project)) == 0 and contents(project) == written  # the same to the byte
    for change in (project / "README.md", project / "benchmarks/README.md", drawn[0]):
        change.write_bytes(b"\x89PNG" if change in drawn else written[change].replace(b"2,", b"3,"))
        capsys.readouterr()
        assert report.main(report.Args(check=True, root=project)) == 1
        assert str(change) in capsys.readouterr().err
        change.write_bytes(written[change])
    write_lines(project / "benchmarks/peers.jsonl", [turns("fast", [2.0])])
    capsys.readouterr()
    assert report.main(report.Args(check=True, root=project)) == 1
    err = capsys.readouterr().err
    assert "speed.png" in err and "benchmarks/README.md" in err and "learning.png" not in err


@pytest.mark.parametrize("name, line, message", [
    ("results.jsonl", "", "line 3: is not a record in JSON"),
    ("results.jsonl", '{"started": "2026', "line 3: is not a record in JSON"),
    ("results.jsonl", "[1, 2]", "line 3: is not a record in JSON"),
    ("results.jsonl", '{"mode": "eager"}', "line 3: is a record without started, agent"),
    ("learning/ppo.jsonl", '{"agent": "ppo"}', "line 3: is a record without env_id"),
    ("peers.jsonl", '{"agent": "ppo", "failed": "x"}', "line 2: is a record without comparison"),
])  # fmt: skip
def test_bad_results_change_nothing(project, capsys, name, line, message):
    results = project / "benchmarks" / name
    lines = results.read_text().splitlines()
    results.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    before = contents(project)
    for check in (False, True):
        with pytest.raises(SystemExit) as end:
            report.main(report.Args(check=check, root=project))
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert contents(project) == before


def test_without_results_the_pages_say_so(project):
    for path in (project / "benchmarks").rglob("*.jsonl"):
        path.unlink()
    assert report.main(report.Args(root=project)) == 0
    assert (project / "benchmarks/README.md").read_text().count("No results yet.") == 3
    assert not (project / "benchmarks/plots").exists()


@pytest.mark.parametrize("text", ["<!-- fps:end -->\n<!-- fps:begin -->\n", "<!-- fps:begin -->\n"])
def test_a_page_with_half_its_markers(project, capsys, text):
    (project / "benchmarks/README.md").write_text(text)
    before = contents(project)
    with pytest.raises(SystemExit) as end:
        report.main(report.Args(root=project))
    assert end.value.code == 2 and "<!-- fps:begin -->" in capsys.readouterr().err
    assert contents(project) == before
