"""benchmarks/peers.py takes turns, goes on after what fails, and divides the right numbers."""

import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402

# Both sides in no time: each call is a line in `turns`, its SPS depends on who calls and on how often it was called.
OURS = """
import json, sys
mode = sys.argv[sys.argv.index("--mode") + 1]
with open("{turns}", "a+") as file:
    file.write(mode + "\\n")
    file.seek(0)
    count = file.read().split().count(mode)
if mode == "compile" and {breaks}:
    sys.exit("error: no compiler here")
print(json.dumps({{"sps": {{"eager": 1000.0, "compile": 3000.0}}[mode] * count}}))
"""
PEER = """
import json, sys
settings = json.loads(sys.argv[1])
with open("{turns}", "a+") as file:
    file.write("{name}\\n")
    file.seek(0)
    count = file.read().split().count("{name}")
if count > {good}:
    raise ValueError("no more")
print("hello", settings["env_id"], settings["steps"])
print(500.0 * count * count)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A project with one comparison and the named peers, each with the turns after which it fails; returns a runner."""

    def measure(good: dict, broken: tuple = (), breaks: bool = False, repeats: int = 3, agent: bool = True):
        turns, results = tmp_path / "turns", tmp_path / "results.jsonl"
        (tmp_path / "benchmarks/peer_scripts").mkdir(parents=True)
        (tmp_path / "agents").mkdir()
        if agent:
            (tmp_path / "agents/fake.py").write_text(OURS.format(turns=turns, breaks=breaks))
        known = {}
        for name, count in good.items():
            script = tmp_path / f"benchmarks/peer_scripts/{name}.py"
            script.write_text(PEER.format(turns=turns, name=name, good=count))
            known[name] = peers.Peer(script.name, [f"{name}==1.0"], ("fast",))

        def install(name, cache):
            if name in broken:
                raise RuntimeError("does not install: no such thing")
            return Path(sys.executable)

        monkeypatch.setattr(peers, "ROOT", tmp_path)
        monkeypatch.setattr(peers, "PEERS", known)
        monkeypatch.setattr(peers, "COMPARISONS", {"fast": ("fake", ["--x", "1"], {"env_id": "E-v1"}, 64, 32)})
        monkeypatch.setattr(peers, "install", install)
        peers.main(peers.Args(("fast",), tuple(known), repeats=repeats, results=results))
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        return {row["peer_name"]: row for row in rows}, turns.read_text().split() if turns.exists() else []

    return measure


def test_takes_turns_and_divides_neighbours(fake, capsys):
    rows, turns = fake({"one": 9})
    assert turns == ["one", "eager", "compile"] * 3
    row = rows["one"]
    assert row["sps"] == {"one": [500, 2000, 4500], "eager": [1000, 2000, 3000], "compile": [3000, 6000, 9000]}
    assert row["ratios"]["eager"] == [2, 1, pytest.approx(2 / 3)] and row["ratios"]["compile"] == [6, 3, 2]
    assert row["ratio_median"] == {"eager": 1, "compile": 3}
    assert (row["comparison"], row["agent"], row["flags"], row["peer"]) == ("fast", "fake", "--x 1", "one==1.0")
    assert row["peer_settings"] == {"env_id": "E-v1", "steps": 32} and row["cores"] >= 1 and row["date"]
    assert "fast compile: 3.00 x one (2.00 to 6.00)" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_rest_goes_on(fake):
    rows, turns = fake({"one": 9, "stops": 1, "absent": 9}, broken=("absent",), repeats=2)
    assert turns == ["one", "stops", "eager", "compile", "one", "stops", "eager", "compile"]
    assert rows["absent"]["failed"] == "does not install: no such thing"
    assert rows["stops"]["failed"] == "does not run: ValueError: no more"
    assert rows["one"]["ratios"] == {"eager": [2, 1], "compile": [6, 3]} and "failed" not in rows["one"]
    assert all("ratios" not in rows[name] and rows[name]["date"] for name in ("absent", "stops"))


def test_without_a_peer_that_works_ours_is_not_measured(fake):
    rows, turns = fake({"stops": 0})
    assert turns == ["stops"] and "no more" in rows["stops"]["failed"]


def test_an_agent_that_is_missing_or_fails_is_the_reason(fake):
    rows, turns = fake({"one": 9}, agent=False)
    assert turns == [] and rows["one"]["failed"] == "there is no agents/fake.py"


def test_a_mode_that_fails_is_the_reason(fake):
    rows, _ = fake({"one": 9}, breaks=True)
    assert rows["one"]["failed"] == "ours does not run in the mode compile: no compiler here"


def test_installs_once_and_again_when_the_requirements_change(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(peers, "run", lambda command, minutes: calls.append(command[5:]))
    monkeypatch.setattr(peers.venv, "create", lambda folder, with_pip: (folder / "bin").mkdir(parents=True))
    for requirements in (["a==1"], ["a==1"], ["a==2", "b"]):
        monkeypatch.setattr(peers, "PEERS", {"one": peers.Peer("", requirements, ())})
        assert peers.install("one", tmp_path) == tmp_path / "one/bin/python"
        (tmp_path / "one/bin/python").touch()
    assert calls == [["a==1"], ["a==2", "b"]]


def test_a_failed_install_is_a_reason_and_tried_again(tmp_path, monkeypatch):
    (tmp_path / "one/bin").mkdir(parents=True)
    (tmp_path / "one/bin/python").write_text(
        "#!/bin/sh\necho 'ERROR: No matching distribution found for a' >&2; exit 1"
    )
    (tmp_path / "one/bin/python").chmod(0o755)
    monkeypatch.setattr(peers, "PEERS", {"one": peers.Peer("", ["a"], ())})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^does not install: No matching distribution found for a$"):
            peers.install("one", tmp_path)


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path):
    with pytest.raises(RuntimeError, match="did not end within 0.002 minutes"):
        peers.run(["sh", "-c", f"(sleep 0.4; touch {tmp_path}/alive) & sleep 60"], minutes=0.002)
    time.sleep(0.5)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("err, said", [
    ("", "no message"),
    ("Traceback ...\nImportError: No module named 'x'\nwandb: done\n", "ImportError: No module named 'x'"),
    ("  urllib.error.URLError: <none>\n  [end]\nerror: subprocess-exited-with-error\nnote: not pip's\n",
     "urllib.error.URLError: <none>"),
    ("error: --mode x: not here\n", "--mode x: not here"),
])  # fmt: skip
def test_reason(err, said):
    assert peers.reason(err) == said


def test_table_shows_the_newest_row_of_each(tmp_path):
    results, page = tmp_path / "peers.jsonl", tmp_path / "README.md"
    facts = {"comparison": "c", "agent": "ppo", "cpu": "CPU", "cores": 2, "commit": "abc", "date": "2026-01-01"}
    old = facts | {"peer": "stable==1", "sps": {"sb3": [100.0], "eager": [300.0]}, "ratios": {"eager": [3.0]}}
    new = facts | {"peer": "stable==2", "peer_name": "sb3", "sps": {"sb3": [100.0, 100.0], "compile": [400.0, 600.0]}}
    bad = facts | {"peer": "other==1", "peer_name": "other", "failed": "does not | run"}
    rows = [old | {"peer": "stable==0"}, old, new | {"ratios": {"compile": [4.0, 6.0]}}, bad]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write_text("# Page\n\nbefore\n")
    for _ in range(2):  # the second time between the markers of the first
        peers.main(peers.Args(report=True, results=results, page=page))
        text = page.read_text()
        assert text.startswith("# Page\n\nbefore\n\n") and text.count(peers.BEGIN) == text.count(peers.END) == 1
        assert "stable==0" not in text
        assert "| c | ppo | stable==1 | eager | 3.00 (3.00–3.00) | 1 | 300 | 100 | CPU, 2 cores |" in text
        assert "| c | ppo | stable==2 | compile | 5.00 (4.00–6.00) | 2 | 500 | 100 |" in text
        assert "| c | ppo | other==1 | – | failed: does not / run |" in text
    results.write_text(results.read_text() + json.dumps(bad | {"peer_name": "sb3"}) + "\n")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert "eager" not in peers.table(rows) and peers.table(rows).count("failed") == 2
    assert peers.table([*rows, old]).count("failed") == 1
    text = peers.table([old, old | {"cores": 1}])
    assert "| CPU, 2 cores |" in text and "| CPU, 1 core |" in text, "a machine of another size has a row of its own"


def test_rows_of_before_stay_readable():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/peers.jsonl").read_text().splitlines()]
    assert "| cartpole | ppo | stable-baselines3==2.9.2 | compile |" in peers.table(rows)


def test_every_peer_has_its_script_and_every_comparison_a_peer():
    taken = [name for peer in peers.PEERS.values() for name in peer.comparisons]
    assert set(taken) == set(peers.COMPARISONS)
    assert all((ROOT / "benchmarks/peer_scripts" / peer.script).is_file() for peer in peers.PEERS.values())
    assert peers.COMPARISONS["cartpole-defaults"][1] == ["--eval-episodes", "0"]
    with pytest.raises(SystemExit):
        peers.main(peers.Args(only=("cartpool",)))
