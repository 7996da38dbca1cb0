"""Bad input is refused in one sentence, and nothing that happens while running loses what was trained."""

import dataclasses
import errno
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import envpool
import filelock
import pytest
import torch
from conftest import (
    ALIKE,
    NAMES,
    Result,
    agent_named,
    contents,
    continuous,
    final_json,
    finish,
    flags,
    read_checkpoint,
    run_agent,
    same_weights,
    script,
    settings,
    slow_unless_new,
    start_agent,
    strict_json,
    tiny,
    whole_steps,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

try:
    import resource
except ImportError:  # not on Windows
    resource = None

each_agent = pytest.mark.parametrize("agent", NAMES)
each_kind = pytest.mark.parametrize("agent", slow_unless_new())
LONG = 10**7  # environment steps that no test waits for


def check_failure(result: Result, *mentioned: str, status: int = 2):
    """A failure is a sentence on stderr that names what is wrong, and an exit status.

    A bad setting stands in the box that tyro draws, which breaks lines; all else is one line that starts with `error:`.
    """
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == status, result.stderr
    messages = result.messages
    boxed = messages and messages[0].startswith("╭─") and messages[-1].startswith("╰─")
    assert boxed or (len(messages) == 1 and messages[0].startswith("error: ")), messages
    assert result.stderr.endswith("\n")
    text = re.sub(r"[─│╭╮╰╯\s]", "", "".join(messages))
    for words in mentioned:
        assert re.sub(r"\s", "", words) in text, (words, result.stderr)
    assert result.stdout == ""


# ---- bad input -------------------------------------------------------------------------------------------------------


def bad_input(agent: str) -> list:
    """Settings that an agent must refuse, each with what its sentence must mention."""
    atari = "atari" in agent
    near = ("Breakot-v5", "Breakout-v5") if atari else ("CartPol-v1", "CartPole-v1")
    # an environment of another family, by its observations or its actions
    wrong = ["MiniGrid-Empty-5x5-v0", "FrozenLake-v1", "BinPack-v2"]
    wrong += ["CartPole-v1"] if atari else ["Pong-v5"]
    wrong += ["CartPole-v1"] if continuous(agent) else ["Pendulum-v1"]
    cases = [({"env_id": near[0]}, near[1]), ({"env_id": "no such game"}, "no such game"), ({"env_id": ""}, "")]
    cases += [({"env_id": env_id}, env_id) for env_id in dict.fromkeys(wrong)]
    cases += [({"device": name}, name) for name in ("tpu", "cuda:99", "cuda:x", "cpu:1", "")]
    cases += [({"mode": mode, "device": "cpu"}, mode) for mode in ("cudagraphs", "compile-cudagraphs")]
    sizes = "total_timesteps num_envs num_steps num_minibatches update_epochs buffer_size batch_size frame_skip"
    cases += [({name: value}, str(value)) for name in sizes.split() for value in (0, -1)]
    reals = ["learning_rate", "gamma", "gae_lambda", "ent_coef", "max_grad_norm", "checkpoint_minutes"]
    reals += ["q_lambda", "start_e", "end_e", "exploration_fraction", "tau", "utd", "policy_lr", "exploration_noise",
              "alpha"]  # fmt: skip
    cases += [({name: value}, str(value)) for name in reals for value in (-0.5, "nan", "inf")]
    cases += [({name: 1.5}, "1.5") for name in ("gamma", "int_gamma", "update_proportion")]
    cases += [({"eval_episodes": -1}, "-1"), ({"num_iterations_obs_norm_init": 0}, "0")]
    cases += [({"seed": value}, str(value)) for value in (-1, 2**60, "one")]
    cases += [({"num_minibatches": 3}, "3"), ({"total_timesteps": 1}, "1")]
    cases += [({"learning_starts": 10**6, "total_timesteps": 1000}, "1000000")]
    cases += [({"buffer_size": 1, "num_envs": 2}, "1")] if "train_frequency" in settings(agent) else []
    cases += [({"alpha": "0.0"}, "0.0")] if agent == "sac_atari" else []  # its loss is divided by alpha
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "cuda"))
    often = {"nan", "inf", 0} if agent in ALIKE else {}  # slow, where other agents stand for it
    slow = [[pytest.mark.slow] * (next(iter(changes.values())) in often) for changes, _ in cases]
    return [
        pytest.param(agent, changes, value, id=f"{agent}-{'-'.join(map(str, changes.items()))}", marks=marks)
        for (changes, value), marks in zip(cases, slow)
        if changes.keys() <= settings(agent)
    ]


@pytest.mark.parametrize("agent, changes, value", [case for agent in NAMES for case in bad_input(agent)])
def test_refuses_bad_settings(agent, changes, value, cli, tmp_path):
    """A setting that cannot be meant is refused by its flag and its value, before anything is written."""
    flag = "--" + next(iter(changes)).replace("_", "-")
    check_failure(cli(agent, *tiny(agent, **changes)), flag, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("agent", ["ppo"])  # the code of it is the same in all
def test_refuses_in_a_process_of_its_own(agent, tmp_path):
    """What the other tests see inside this process is what a user sees: one line, or a box, and the status."""
    started = start_agent(agent, "--gamma", "1.5", cwd=tmp_path)
    check_failure(run_agent(agent, "--env-id", "Breakot-v4", cwd=tmp_path), "--env-id", "Breakout")
    check_failure(finish(started), "--gamma", "1.5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--run-dir"])
@each_kind
def test_refuses_an_empty_name(agent, flag, cli, tmp_path):
    """As of a shell variable that is not set: nobody meant to train anew by it."""
    check_failure(cli(agent, flag, ""), flag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("agent", [agent for agent in NAMES if "learning_starts" in settings(agent)])
def test_refuses_a_run_that_would_learn_nothing(agent, cli, tmp_path):
    """An iteration learns if it begins where learning starts, or later, and after a first one."""
    module = agent_named(agent)
    size = module.parse_args(tiny(agent)).iteration_steps
    for total, starts, learns in ((2, 0, True), (1, 0, False), (4, 3 * size, True), (4, 3 * size + 1, False)):
        argv = [*tiny(agent), "--learning-starts", str(starts), "--total-timesteps", str(total * size)]
        if learns:
            module.parse_args(argv)
        else:
            check_failure(cli(agent, *argv), "--learning-starts", "--total-timesteps")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("agent", [x for x in NAMES if "atari" not in x and "continuous" not in x])
def test_what_cannot_be_drawn_is_refused_before_training(agent, cli, tmp_path):
    check_failure(cli(agent, *tiny(agent, env_id="Blackjack-v1"), "--video"), "--video", "Blackjack-v1")
    assert not list(tmp_path.iterdir())


@each_kind
def test_refuses_a_run_dir_in_use(agent, cli, tmp_path):
    """--run-dir never mixes a run into other files, nor replaces one."""
    (tmp_path / "full").mkdir()
    for name in ("full/notes.txt", "file"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for name in ("full", "file"):
        check_failure(cli(agent, *tiny(agent, run_dir=name)), "--run-dir", name)
        assert contents(tmp_path) == before


@each_agent
def test_refuses_a_run_dir_that_cannot_be_made(agent, cli, tmp_path):
    """A folder that cannot be made is the user's to correct; below a file not even root can make one."""
    (tmp_path / "file").write_text("mine")
    check_failure(cli(agent, *tiny(agent, run_dir="file/run")), "--run-dir", "file/run")
    assert contents(tmp_path) == {"file": b"mine"}


def test_two_runs_started_at_once_share_no_folder(cli, tmp_path):
    """Of two that name the same folder one trains and the other ends with a sentence; default names differ."""
    runs = [finish(run) for run in [start_agent("ppo", *tiny("ppo", run_dir="run"), cwd=tmp_path) for _ in range(2)]]
    assert sorted(run.returncode for run in runs) == [0, 2]
    check_failure(next(run for run in runs if run.returncode), "--run-dir run", "in use")
    assert len({final_json(cli("ppo", *tiny("ppo")))["run_dir"] for _ in range(3)}) == 3


# ---- run folders that cannot be used ---------------------------------------------------------------------------------


def change_config(run_dir, **changes):
    """Edit the settings of a run by hand."""
    config = json.loads((run_dir / "config.json").read_text())
    config["args"] |= changes
    (run_dir / "config.json").write_text(json.dumps(config))


both = pytest.mark.parametrize("flag", ["--resume", "--evaluate"])


@both
@each_agent
def test_refuses_a_folder_without_a_run(agent, flag, cli, tmp_path):
    """A mistyped folder is not taken for a new one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("missing", "empty", "file"):
        check_failure(cli(agent, flag, name), flag, name, "no run of", agent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@both
@pytest.mark.parametrize("config", ["", "{", "[1]", "{}", '{"agent": "AGENT"}', '{"agent": "AGENT", "args": {"x": 1}}'])
@each_kind
def test_refuses_a_foreign_config(agent, config, flag, cli, tmp_path):
    """A config.json of something else is refused, whatever is in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.replace("AGENT", agent))
    before = contents(tmp_path)
    check_failure(cli(agent, flag, "run"), "--x" if '"x"' in config else f"run is no run of {agent}")
    assert contents(tmp_path) == before


@each_kind
def test_refuses_a_run_without_a_checkpoint(agent, runs, cli, tmp_path):
    """There is nothing to evaluate, nor to go on with, in a run that was killed at its very start."""
    run_dir = runs(agent).copy(tmp_path / "run")
    (run_dir / "checkpoint.pt").unlink()
    for flag in ("--evaluate", "--resume"):
        check_failure(cli(agent, flag, "run"), "run/checkpoint.pt is missing")


@each_kind
def test_resuming_stays_in_its_folder(agent, runs, cli, tmp_path):
    """--resume with another --run-dir, or with --evaluate, is refused and not half obeyed."""
    runs(agent).copy(tmp_path / "run")
    check_failure(cli(agent, "--resume", "run", "--run-dir", "other"), "--run-dir", "--resume")
    check_failure(cli(agent, "--resume", "run", "--evaluate", "run"), "--evaluate")
    check_failure(cli(agent, "--evaluate", "run", "--run-dir", "other"), "--run-dir", "--evaluate")


@each_kind
def test_a_checkpoint_is_read_once_nobody_else_can_replace_it(agent, runs, tmp_path, monkeypatch):
    """The run that a resumption waits for would be lost, did it end between reading and locking."""
    module, load, locked = agent_named(agent), torch.load, []
    run_dir = runs(agent).copy(tmp_path / "run")

    def load_locked(*inputs, **options):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(run_dir / ".lock", blocking=False).acquire()
        locked.append(True)
        return load(*inputs, **options)

    monkeypatch.setattr(torch, "load", load_locked)
    module.main(module.parse_args(["--resume", str(run_dir)]))
    assert locked


@pytest.mark.parametrize("mode", ["compile", "cudagraphs", "compile-cudagraphs"])
@each_kind
def test_a_run_of_another_machine_is_evaluated(agent, mode, runs, cli, tmp_path, monkeypatch):
    """--evaluate plays what a GPU or a compiler trained, on a machine that has neither."""
    run_dir = runs(agent).copy(tmp_path / "run")
    change_config(run_dir, mode=mode, device="cuda:7", eval_episodes=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    if mode == "compile":  # that the device is refused otherwise is among the bad input
        check_failure(cli(agent, "--resume", "run"), "--device cuda:7")
        check_failure(cli(agent, "--resume", "run", "--device", "cpu"), "--mode compile", "compiler")
    assert final_json(cli(agent, "--evaluate", "run"))["eval_episodes"] == 1


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_settings_edited_by_hand(flag, runs, cli, tmp_path):
    """What a user writes into config.json is read as if it stood on the command line."""
    run_dir = runs("ppo").copy(tmp_path / "run")
    change_config(run_dir, num_envs="8")
    assert final_json(cli("ppo", flag, "run"))["num_envs"] == 8
    change_config(run_dir, num_envs=[8])
    check_failure(cli("ppo", flag, "run"), "--num-envs")
    change_config(run_dir, num_envs=4, mode="fast")
    check_failure(cli("ppo", flag, "run"), "--mode", "fast")
    change_config(run_dir, mode="eager", gamma=1.5)
    check_failure(cli("ppo", flag, "run"), "--gamma 1.5")


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "random bytes": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "empty": lambda path: path.write_bytes(b""),
    "only a network": lambda path: torch.save(torch.load(path, weights_only=True)["agent"], path),
    "no dictionary": lambda path: torch.save([1, 2, 3], path),
    "no counters": lambda path: torch.save({"agent": {}, "optimizer": {}}, path),
    "another network": lambda path: torch.save(torch.load(path, weights_only=True) | {"agent": {}}, path),
    "another optimizer": lambda path: torch.save(torch.load(path, weights_only=True) | {"optimizer": {}}, path),
}


@both
@pytest.mark.parametrize("damage", DAMAGE)
@each_kind
def test_refuses_a_damaged_checkpoint(agent, damage, flag, runs, cli, tmp_path):
    """A checkpoint that is damaged or of something else is refused, and left as it is."""
    if damage == "another optimizer" and flag == "--evaluate":
        pytest.skip("an evaluation needs no optimizer")
    run_dir = runs(agent).copy(tmp_path / "run")
    DAMAGE[damage](run_dir / "checkpoint.pt")
    before = contents(tmp_path)
    result = cli(agent, flag, "run")
    assert contents(tmp_path) == before
    check_failure(result, "run/checkpoint.pt")


@both
@each_kind
def test_refuses_the_run_of_another(agent, flag, runs, cli, tmp_path):
    """A run of another agent, or of a network of another shape, is refused and not touched."""
    run_dir = runs(agent).copy(tmp_path / "run")
    before = contents(tmp_path)
    env_id = "Pong-v5" if "atari" in agent else "HalfCheetah-v5" if continuous(agent) else "Acrobot-v1"
    other = NAMES[NAMES.index(agent) - 1]
    check_failure(cli(other, flag, run_dir), flag, str(run_dir), f"no run of {other}", f"one of {agent}")
    foreign_env = cli(agent, flag, run_dir, "--env-id", env_id)
    assert contents(tmp_path) == before
    check_failure(foreign_env, f"{run_dir}/checkpoint.pt", "environment")


@both
@pytest.mark.parametrize("agent", [agent for agent in NAMES if continuous(agent)])
def test_refuses_an_environment_whose_actions_have_other_bounds(agent, flag, cli, tmp_path):
    """Pendulum's go from -2 to 2, those of the other pendulum from -1 to 1; all else has the same shapes."""
    final_json(cli(agent, *tiny(agent, env_id="Pendulum-v1", run_dir="run", eval_episodes=0)))
    before = contents(tmp_path)
    check_failure(cli(agent, flag, "run", "--env-id", "PendulumSwingup-v1"), "run/checkpoint.pt", "bounds")
    assert contents(tmp_path) == before


@each_kind
def test_a_notebook_can_try_again(agent, runs, tmp_path):
    """After a failure whose traceback, and with it every variable of the run, is kept; a wrong name leaves nothing."""
    module, run_dir = agent_named(agent), runs(agent).copy(tmp_path / "run")
    whole, failures = (run_dir / "checkpoint.pt").read_bytes(), []
    args = module.parse_args(["--resume", str(run_dir)])
    (run_dir / "checkpoint.pt").write_bytes(whole[:1000])
    for folder in (str(run_dir), str(tmp_path / "other")):
        with pytest.raises(module.UserError, match="missing or damaged") as failure:
            module.main(dataclasses.replace(args, resume=folder))
        failures.append(failure.value)
    assert not (tmp_path / "other").exists()
    (run_dir / "checkpoint.pt").write_bytes(whole)
    assert module.main(args)["run_dir"] == str(run_dir) and len(failures) == 2


@each_kind
def test_refused_resume_changes_nothing(agent, runs, cli, tmp_path):
    """A resumption that is refused for another flag leaves the run as it was."""
    runs(agent).copy(tmp_path / "run")
    before = contents(tmp_path)
    check_failure(cli(agent, "--resume", "run", "--num-envs", 0), "--num-envs")
    assert contents(tmp_path) == before


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", slow_unless_new(ALIKE - {"ppo_atari_lstm", "rainbow_atari", "ppo_rnd_atari"}))
def test_resume_goes_on(agent, runs, cli, tmp_path):
    """A longer --total-timesteps goes on with a finished run: counters, optimizer, curves and time add up.

    It stretches what is lowered over the run, which so rises again: a line on stderr says from what to what.
    """
    done = runs(agent)
    run_dir, start = done.copy(tmp_path / "run"), final_json(done.result)
    longer = ["--resume", "run", "--total-timesteps", 2 * start["global_step"] + 1]
    longer += ["--exploration-fraction", "1"] if "exploration_fraction" in settings(agent) else []
    result = cli(agent, *longer)
    summary, rises = final_json(result), [line for line in result.messages if "rises from" in line]
    args = agent_named(agent).parse_args(done.argv)
    for name, flag in (("learning rate", "anneal_lr"), ("epsilon", "exploration_fraction")):
        said = [re.search(rf"{name} rises from (\S+) to (\S+),", line) for line in rises if name in line]
        assert len(said) == bool(getattr(args, flag, 0)), rises
        assert all(float(match[1]) < float(match[2]) for match in said)
    assert all(line.endswith(", following the flags") for line in rises) and len(summary["notes"]) == len(rises)
    assert summary["global_step"] == 2 * start["global_step"] and summary["run_dir"] == "run"
    assert summary["wall_seconds"] > start["wall_seconds"] and summary["seed"] == start["seed"]
    before, after = read_checkpoint(done.path), read_checkpoint(run_dir)
    assert after["global_step"] == summary["global_step"] and not same_weights(before, after)
    assert strict_json((run_dir / "summary.json").read_text()) == summary
    if "optimizer" in after and agent.startswith(("ppo", "pqn")):
        old, new = ({s["step"].item() for s in x["optimizer"]["state"].values()} for x in (before, after))
        assert new == {2 * step for step in old} and len(new) == 1
    events = EventAccumulator(str(run_dir))
    events.Reload()
    steps = [point.step for point in events.Scalars("charts/SPS")]
    assert steps == sorted(set(steps)) and steps[0] < start["global_step"] and steps[-1] == summary["global_step"]


@each_kind
def test_resume_of_a_finished_run_trains_no_more(agent, runs, cli, tmp_path):
    """Resuming what is finished, under its own settings, only scores it again."""
    done = runs(agent)
    run_dir, start = done.copy(tmp_path / "run"), final_json(done.result)
    result = cli(agent, "--resume", "run")
    summary = final_json(result)
    assert not [line for line in result.messages if "rises" in line]
    assert same_weights(read_checkpoint(done.path), read_checkpoint(run_dir))
    for name in ("global_step", "eval_return_mean", "train_return_mean"):
        assert summary[name] == start[name], name


def test_resume_with_other_sizes_keeps_to_the_total(runs, cli, tmp_path):
    """Other rollout sizes after a resumption: the run still ends at the last whole iteration before its total."""
    step = final_json(runs("ppo").result)["global_step"]
    runs("ppo").copy(tmp_path / "run")
    total = step + 2 * step
    summary = final_json(cli("ppo", "--resume", "run", "--num-envs", 6, "--total-timesteps", total))
    assert total % (6 * 16) == 0 and step % (6 * 16) != 0
    assert step < summary["global_step"] <= total and total - summary["global_step"] < 6 * 16


# ---- failures while running ------------------------------------------------------------------------------------------


def wait_until(condition, process: subprocess.Popen, seconds: float = 120):
    """Wait until a condition holds; the process must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > end:
            process.kill()
            pytest.fail("the run did not get so far")
        time.sleep(0.002)


def steps_saved(run_dir) -> int:
    """The steps that the checkpoint of a run holds, -1 before there is one."""
    return read_checkpoint(run_dir)["global_step"] if (run_dir / "checkpoint.pt").exists() else -1


def resume_to_end(cli, run_dir, steps: int):
    """Resume a CartPole run for a few iterations more and check that it ends well; returns the summary."""
    argv = ["--resume", run_dir, "--total-timesteps", steps + 133]
    summary = final_json(cli("ppo", *argv))
    assert summary["global_step"] == whole_steps("ppo", list(map(str, argv))) > steps
    assert summary["stopped_by"] is None and summary["eval_episodes"] == 2
    assert read_checkpoint(run_dir)["global_step"] == summary["global_step"]
    assert not list(run_dir.glob("*.tmp"))
    return summary


endless = ["--total-timesteps", str(LONG), "--checkpoint-minutes", "0", "--run-dir", "run"]


def test_kill_9_leaves_a_run_to_resume(cli, tmp_path):
    """Killed in the middle of training, and killed again after a resumption, a run goes on from its last checkpoint.

    While it lives nobody else can go on with it, nor begin another in its folder; once killed, at once.
    """
    run_dir, reached = tmp_path / "run", 0
    for argv in ([*tiny("ppo"), *endless], ["--resume", "run"]):
        process = start_agent("ppo", *argv, cwd=tmp_path)
        wait_until(lambda: steps_saved(run_dir) > reached + 300, process)  # noqa: B023
        check_failure(cli("ppo", "--resume", "run"), "--resume run", "in use")
        check_failure(cli("ppo", *tiny("ppo", run_dir="run")), "--run-dir run", "in use")
        assert process.poll() is None
        time.sleep(0.013)  # somewhere in an iteration
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
        assert steps_saved(run_dir) > reached + 300 and steps_saved(run_dir) % 64 == 0
        reached = steps_saved(run_dir)
    wall_seconds = read_checkpoint(run_dir)["wall_seconds"]
    assert resume_to_end(cli, run_dir, reached)["wall_seconds"] > wall_seconds


CRASH = """
import os, pathlib, runpy, signal, sys
calls, limit, where = [], int(sys.argv.pop(1)), sys.argv.pop(1)
write_bytes, replace = pathlib.Path.write_bytes, os.replace
def count(real, at, *inputs):
    calls.append(at)
    if calls.count(at) > limit and at == where:
        if at == "write":  # the process goes down before all of the file is written
            real(inputs[0], inputs[1][: len(inputs[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*inputs)
pathlib.Path.write_bytes = lambda *inputs: count(write_bytes, "write", *inputs)
os.replace = lambda *inputs: count(replace, "rename", *inputs)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


slow = pytest.mark.slow
CASES = [(3, "write"), (2, "rename"), pytest.param(0, "write", marks=slow), pytest.param(5, "write", marks=slow)]


@pytest.mark.parametrize("files, where", CASES)
def test_kill_9_while_a_file_is_written(files, where, cli, tmp_path):
    """Half a file is never taken for the whole: there is the one before, or none, and a run goes on from it."""
    command = [sys.executable, "-c", CRASH, str(files), where, script("ppo"), *tiny("ppo"), *endless]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run_dir = tmp_path / "run"
    assert steps_saved(run_dir) == {0: -1, 2: -1, 3: 0}.get(files, steps_saved(run_dir))
    assert (run_dir / "config.json").exists() == (files > 0) and list(run_dir.glob("*.tmp"))
    if files > 2:
        resume_to_end(cli, run_dir, steps_saved(run_dir))
    else:  # nothing was trained that could be lost
        check_failure(cli("ppo", "--resume", "run"), "run")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_end_a_run_in_order(number, cli, tmp_path):
    """Ctrl-C and SIGTERM save a checkpoint, leave a summary that says so, and the run can go on later."""
    process = start_agent("ppo", *tiny("ppo"), *endless, cwd=tmp_path)
    wait_until(lambda: steps_saved(tmp_path / "run") > 0, process)
    process.send_signal(number)
    result, run_dir = finish(process, timeout=60), tmp_path / "run"
    assert result.returncode == 128 + number, result.stderr
    assert "Traceback" not in result.stderr and result.messages == []
    summary = strict_json(result.stdout.splitlines()[-1])
    assert summary == strict_json((run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == number.name
    assert 0 < summary["global_step"] < LONG and summary["global_step"] == steps_saved(run_dir)
    assert resume_to_end(cli, run_dir, steps_saved(run_dir))["wall_seconds"] > summary["wall_seconds"]


@each_kind
def test_stopped_before_the_end_leaves_a_summary(agent, tmp_path):
    """A stop ends training after an iteration and skips the score, also where a film was asked for."""
    module = agent_named(agent)
    argv = [*tiny(agent, run_dir=tmp_path / "run"), "--video"]
    summary = module.main(module.parse_args(argv), [signal.SIGTERM])
    assert summary["stopped_by"] == "SIGTERM" and summary == strict_json((tmp_path / "run/summary.json").read_text())
    trained = "num_iterations_obs_norm_init" not in settings(agent)  # RND was stopped among its random actions
    assert summary["global_step"] < whole_steps(agent, argv) and (summary["global_step"] > 0) == trained
    assert read_checkpoint(tmp_path / "run")["global_step"] == summary["global_step"]
    learnt = "learning_starts" not in settings(agent) and trained
    assert (summary["sps_update"] is not None) == learnt, "a first iteration of an off-policy agent learns nothing"


@each_kind
def test_non_finite_loss_ends_a_run(agent, cli, tmp_path, monkeypatch):
    """A loss that is not finite ends the run with a sentence, and the checkpoint from before it can be resumed."""
    argv = tiny(agent, run_dir=tmp_path / "run", checkpoint_minutes=0)
    argv += ["--checkpoint-buffer", "never"] if "checkpoint_buffer" in settings(agent) else []  # it has the reward
    total, steps, make = whole_steps(agent, argv), [0], envpool.make
    spoilt = total * (0.85 if "buffer_size" in settings(agent) else 0.6)  # learning has begun

    def make_spoilt(*arguments, **options):
        envs = make(*arguments, **options)
        step = envs.step

        def spoilt_step(actions):
            obs, rewards, *rest = step(actions)
            steps[0] += len(rewards)
            return obs, rewards * float("nan") if steps[0] > spoilt else rewards, *rest

        envs.step = spoilt_step
        return envs

    monkeypatch.setattr(envpool, "make", make_spoilt)
    flag = "--learning-rate" if "learning_rate" in settings(agent) else "--q-lr"
    check_failure(cli(agent, *argv), "not finite", flag, status=1)
    assert 0 < read_checkpoint(tmp_path / "run")["global_step"] < total
    assert not list((tmp_path / "run").glob("*.tmp"))
    monkeypatch.undo()
    assert final_json(cli(agent, "--resume", "run"))["global_step"] == total


def test_full_disk_keeps_the_checkpoint(runs, tmp_path):
    """Where a checkpoint does not fit on the disk any more, the one before stays whole."""
    if not resource:
        pytest.skip("needs resource limits")
    run_dir = runs("ppo").copy(tmp_path / "run")
    before = contents(run_dir)
    room = len(before["checkpoint.pt"]) // 2
    assert len(before["ppo.py"]) < room  # the script and the settings still fit
    result = run_agent(
        "ppo", "--resume", "run", *flags(total_timesteps=1000, learning_rate=1e-4), cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    check_failure(result, os.strerror(errno.EFBIG), "checkpoint", status=1)
    after = contents(run_dir)
    assert {name: after.get(name) for name in before if name != "config.json"} == {
        name: content for name, content in before.items() if name != "config.json"
    }
    assert all("tfevents" in name for name in after.keys() - before.keys()), "a half of a file is left"


def test_disk_that_fills_up_while_training(cli, tmp_path, monkeypatch):
    """A disk that is full in the middle of training ends the run in one sentence, on a line of its own."""
    write_bytes, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 5:
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = cli("ppo", *tiny("ppo", run_dir="run", checkpoint_minutes=0))
    monkeypatch.undo()
    run_dir = tmp_path / "run"
    assert 0 < steps_saved(run_dir) < 256
    assert not list(run_dir.glob("*.tmp")) and not (run_dir / "summary.json").exists()
    check_failure(result, os.strerror(errno.ENOSPC), "checkpoint", status=1)


@pytest.mark.slow
def test_full_disk_for_the_curves(tmp_path):
    """Where the event file does not fit on the disk any more, the run ends in one sentence as well."""
    if not resource:
        pytest.skip("needs resource limits")
    room = 200_000  # the checkpoint and a few hundred iterations' curves
    argv = tiny("ppo", run_dir="run", num_envs=2, num_steps=8, update_epochs=1, total_timesteps=20_000)
    result = run_agent(
        "ppo", *argv, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    assert steps_saved(tmp_path / "run") >= 0 and not list((tmp_path / "run").glob("*.tmp"))
    check_failure(result, status=1)


# ---- what is not the agent's doing -----------------------------------------------------------------------------------


ENDS = [("| true", errno.EPIPE), pytest.param("> /dev/full", errno.ENOSPC, marks=pytest.mark.slow)]
ENDS += [pytest.param(">&-", 0, marks=pytest.mark.slow)]  # what is not there at all is not written to


@pytest.mark.parametrize("end, number", ENDS)
def test_a_stdout_that_is_closed_or_full(end, number, runs, tmp_path):
    """Nobody reads the summary: a sentence, and no traceback of whatever is left to be written at the end."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    runs("ppo").copy(tmp_path / "run")
    command = shlex.join([sys.executable, str(script("ppo")), "--evaluate", "run", "--eval-episodes", "1"]) + f" {end}"
    process = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120
    )
    if number:
        check_failure(Result(process.returncode, "", process.stderr), os.strerror(number), status=1)
    else:
        assert process.returncode == 0 and process.stderr == ""


@each_kind
def test_memory_that_cannot_be_given(agent, cli, tmp_path):
    """Where the data of a run does not fit in memory, a sentence says so; `ulimit -v` stands for a small machine."""
    if not resource or not Path("/proc/self/statm").exists():
        pytest.skip("needs resource limits")
    if "buffer_size" in settings(agent):
        changes, words, status = {"buffer_size": 10**10}, ["--buffer-size"], 2
    else:
        changes, words, status = {"num_steps": 2**24, "num_minibatches": 1}, ["memory"], 1
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        result = cli(agent, *tiny(agent, run_dir="run", **changes))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    check_failure(result, *words, status=status)


@pytest.mark.parametrize("compiler", ["no-such-compiler", None])
@each_agent
def test_compile_without_a_compiler(agent, compiler, cli, tmp_path, monkeypatch):
    """torch.compile without a C++ compiler would fail in the middle of a run."""
    monkeypatch.setenv("CXX", compiler) if compiler else monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_failure(cli(agent, *tiny(agent, mode="compile")), "--mode compile", "C++ compiler")
    assert not list(tmp_path.iterdir())
    assert agent_named(agent).parse_args(tiny(agent, mode="auto")).mode == "auto", "which takes none, then"


@each_agent
def test_compile_without_python_h(agent, tmp_path, monkeypatch):
    """A distribution's Python often comes without the header that compiled code includes."""
    module = agent_named(agent)
    monkeypatch.setenv("CXX", sys.executable)  # whatever runs
    for headers in (True, False):
        monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
        (tmp_path / "Python.h").touch() if headers else (tmp_path / "Python.h").unlink()
        assert module.can_compile() == headers
    with pytest.raises(ValueError, match="Python.h"):
        module.Args(device="cpu", mode="compile")


# ---- Weights & Biases ------------------------------------------------------------------------------------------------

WANDB = """
import json
from pathlib import Path

class Run:
    def __init__(self, id):
        self.id = id or "id-1"

    def finish(self):
        print("finished")

def init(**options):
    if Path("logged-out").exists():
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")
    with open("calls", "a") as calls:
        print(json.dumps(options), file=calls)
    return Run(options["id"])
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A folder for a module wandb that stands for the real one, which is no dependency."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # put back what there was
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    sys.modules.pop("wandb", None)


@each_kind
def test_track(agent, wandb, cli, tmp_path):
    """Settings and id go to Weights & Biases, which is done before the summary; a resumed run goes on there too."""
    (wandb / "wandb.py").write_text(WANDB)
    argv = tiny(agent, run_dir="run", track=True, eval_episodes=0)
    (tmp_path / "logged-out").touch()
    check_failure(cli(agent, *argv), "--track", "api_key not configured")
    (tmp_path / "logged-out").unlink()
    gc.collect()  # the lock of the failed run, which its process would free; Python 3.13 may keep it until here
    first = cli(agent, *argv)  # the same command once more
    again = cli(agent, "--resume", "run", "--total-timesteps", 2 * whole_steps(agent, argv))
    for result in (first, again):
        assert result.stdout.splitlines()[0] == "finished" and final_json(result)["run_dir"] == "run"
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call["id"] for call in calls] == [None, "id-1"] and calls[0]["sync_tensorboard"]
    assert calls[0]["config"]["env_id"] == agent_named(agent).parse_args(argv).env_id
    assert {call["name"] for call in calls} == {"run"} and calls[1]["resume"] == "allow"


@each_kind
def test_track_without_the_package(agent, wandb, cli, tmp_path):
    """A folder named wandb, such as the package itself leaves, is not the package; the same command works later."""
    for folder in (wandb, tmp_path):
        (folder / "wandb" / "run-1").mkdir(parents=True)
    argv = tiny(agent, run_dir="run", track=True, eval_episodes=0)
    check_failure(cli(agent, *argv), "--track", "wandb")
    sys.modules.pop("wandb", None)
    gc.collect()  # the lock, as above
    (wandb / "wandb").rename(wandb / "other")
    (wandb / "wandb.py").write_text(WANDB)
    assert final_json(cli(agent, *argv))["run_dir"] == "run"
