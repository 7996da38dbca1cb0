"""benchmarks/peers.py takes turns, goes on after what fails, and divides the right numbers."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import agent_named

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


def test_every_peer_has_its_script_and_every_comparison_a_peer():
    taken = [name for peer in peers.PEERS.values() for name in peer.comparisons]
    assert set(taken) == set(peers.COMPARISONS)
    assert all((ROOT / "benchmarks/peer_scripts" / peer.script).is_file() for peer in peers.PEERS.values())
    assert peers.COMPARISONS["cartpole-defaults"][1] == ["--eval-episodes", "0"]
    with pytest.raises(SystemExit):
        peers.main(peers.Args(only=("cartpool",)))


def test_precision_is_named_where_a_default_could_change_it():
    for name, (agent, flags, *_) in peers.COMPARISONS.items():
        if "atari" in agent or name in ("sac", "td3", "ddpg"):
            assert flags[flags.index("--precision") + 1] == ("bf16" if "atari" in agent else "fp32")


@pytest.mark.parametrize("name", sorted(peers.COMPARISONS))
def test_agents_know_the_flags_of_the_comparisons(name):
    agent, flags, *_, steps, _ = peers.COMPARISONS[name]
    args = agent_named(agent).parse_args([*flags, "--total-timesteps", str(steps)])
    assert args.eval_episodes == 0
