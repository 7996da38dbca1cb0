"""Bad input is refused in one sentence, and nothing that happens while running loses what was trained."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
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
LONG = 10**7  # environment steps that no test waits for


def check_failure(result: Result, *mentioned: str, status: int = 2):
    """A failure is one line on stderr that starts with `error:` and names what is wrong, and an exit status."""
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == status, result.stderr
    assert len(result.messages) == 1, result.messages
    assert result.messages[0].startswith("error: ") and result.stderr.endswith("\n")
    for text in mentioned:
        assert text in result.messages[0]
    assert result.stdout == ""


# ---- bad input -------------------------------------------------------------------------------------------------------


def bad_input(agent: str) -> list:
    """Settings that an agent must refuse, each with what its sentence must mention."""
    atari = "atari" in agent
    near = ("Breakot-v5", "Breakout-v5") if atari else ("CartPol-v1", "CartPole-v1")
    # an environment of another family, by its observations or its actions
    wrong = ["MiniGrid-Empty-5x5-v0", "FrozenLake-v1", "WalkerWalk-v1"]
    wrong += ["CartPole-v1"] if atari else ["Pong-v5"]
    wrong += ["CartPole-v1"] if continuous(agent) else ["Pendulum-v1"]
    cases = [({"env_id": near[0]}, near[1]), ({"env_id": "no such game"}, "no such game"), ({"env_id": ""}, "")]
    cases += [({"env_id": env_id}, env_id) for env_id in dict.fromkeys(wrong)]
    cases += [({"device": name}, name) for name in ("tpu", "cuda:99", "cuda:x", "cpu:1", "")]
    cases += [({"mode": mode, "device": "cpu"}, mode) for mode in ("cudagraphs", "compile-cudagraphs")]
    sizes = "total_timesteps num_envs num_steps num_minibatches update_epochs buffer_size batch_size frame_skip"
    cases += [({name: value}, str(value)) for name in sizes.split() for value in (0, -1)]
    reals = ["learning_rate", "gamma", "gae_lambda", "ent_coef", "max_grad_norm", "checkpoint_minutes"]
    reals += ["q_lambda", "start_e", "end_e", "exploration_fraction", "tau", "utd", "policy_lr", "exploration_noise"]
    cases += [({name: value}, str(value)) for name in reals for value in (-0.5, "nan", "inf")]
    cases += [({"gamma": 1.5}, "1.5"), ({"seed": -1}, "-1"), ({"seed": 2**40}, ""), ({"eval_episodes": -1}, "-1")]
    cases += [({"num_minibatches": 3}, "3"), ({"total_timesteps": 1}, "1")]
    cases += [
        ({"buffer_size": 1, "num_envs": 2}, "1"),
        ({"learning_starts": 10**6, "total_timesteps": 1000}, "1000000"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "cuda"))
    return [
        pytest.param(agent, changes, value, id=f"{agent}-{'-'.join(map(str, changes.items()))}")
        for changes, value in cases
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
    """What the other tests see inside this process is what a user sees: one line and the status."""
    check_failure(run_agent(agent, "--env-id", "Breakot-v4", cwd=tmp_path), "--env-id", "Breakout")
    assert not list(tmp_path.iterdir())


@each_agent
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


# ---- run folders that cannot be used ---------------------------------------------------------------------------------

both = pytest.mark.parametrize("flag", ["--resume", "--evaluate"])


@both
@each_agent
def test_refuses_a_folder_without_a_run(agent, flag, cli, tmp_path):
    """A mistyped folder is not taken for a new one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("missing", "empty", "file"):
        check_failure(cli(agent, flag, name), flag, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@both
@pytest.mark.parametrize("config", ["", "{", "[1]", "{}", '{"agent": "AGENT"}', '{"agent": "AGENT", "args": {"x": 1}}'])
@each_agent
def test_refuses_a_foreign_config(agent, config, flag, cli, tmp_path):
    """A config.json of something else is refused, whatever is in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.replace("AGENT", agent))
    before = contents(tmp_path)
    check_failure(cli(agent, flag, "run"), flag, "run")
    assert contents(tmp_path) == before


@each_agent
def test_refuses_to_evaluate_before_the_first_checkpoint(agent, runs, cli, tmp_path):
    """There is nothing to evaluate in a run that was killed at its very start."""
    run_dir = runs(agent).copy(tmp_path / "run")
    (run_dir / "checkpoint.pt").unlink()
    check_failure(cli(agent, "--evaluate", "run"), "--evaluate run")


@each_agent
def test_resuming_stays_in_its_folder(agent, runs, cli, tmp_path):
    """--resume with another --run-dir, or with --evaluate, is refused and not half obeyed."""
    runs(agent).copy(tmp_path / "run")
    check_failure(cli(agent, "--resume", "run", "--run-dir", "other"), "--run-dir other")
    check_failure(cli(agent, "--resume", "run", "--evaluate", "run"), "--evaluate")


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
@each_agent
def test_refuses_a_damaged_checkpoint(agent, damage, flag, runs, cli, tmp_path):
    """A checkpoint that is damaged or of something else is refused, and left as it is."""
    if damage == "another optimizer" and flag == "--evaluate":
        pytest.skip("an evaluation needs no optimizer")
    run_dir = runs(agent).copy(tmp_path / "run")
    DAMAGE[damage](run_dir / "checkpoint.pt")
    before = contents(tmp_path)
    result = cli(agent, flag, "run")
    assert contents(tmp_path) == before
    check_failure(result, flag)


@both
@each_agent
def test_refuses_the_run_of_another(agent, flag, runs, cli, tmp_path):
    """A run of another agent, or of a network of another shape, is refused and not touched."""
    run_dir = runs(agent).copy(tmp_path / "run")
    before = contents(tmp_path)
    env_id = "Pong-v5" if "atari" in agent else "HalfCheetah-v5" if continuous(agent) else "Acrobot-v1"
    for other in NAMES:
        if other != agent:
            check_failure(cli(other, flag, run_dir), flag, agent, other)
    foreign_env = cli(agent, flag, run_dir, "--env-id", env_id)
    assert contents(tmp_path) == before
    check_failure(foreign_env, flag)


@each_agent
def test_refused_resume_changes_nothing(agent, runs, cli, tmp_path):
    """A resumption that is refused for another flag leaves the run as it was."""
    runs(agent).copy(tmp_path / "run")
    before = contents(tmp_path)
    check_failure(cli(agent, "--resume", "run", "--num-envs", 0), "--num-envs")
    assert contents(tmp_path) == before


# ---- resuming --------------------------------------------------------------------------------------------------------


@each_agent
def test_resume_goes_on(agent, runs, cli, tmp_path):
    """A longer --total-timesteps goes on with a finished run: counters, optimizer, curves and time add up."""
    done = runs(agent)
    run_dir, start = done.copy(tmp_path / "run"), final_json(done.result)
    longer = ["--resume", "run", "--total-timesteps", 2 * start["global_step"] + 1]
    summary = final_json(cli(agent, *longer))
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


@each_agent
def test_resume_of_a_finished_run_trains_no_more(agent, runs, cli, tmp_path):
    """Resuming what is finished, under its own settings, only scores it again."""
    done = runs(agent)
    run_dir, start = done.copy(tmp_path / "run"), final_json(done.result)
    summary = final_json(cli(agent, "--resume", "run"))
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
    """Killed in the middle of training, and killed again after a resumption, a run goes on from its last checkpoint."""
    run_dir, reached = tmp_path / "run", 0
    for argv in ([*tiny("ppo"), *endless], ["--resume", "run"]):
        process = start_agent("ppo", *argv, cwd=tmp_path)
        wait_until(lambda: steps_saved(run_dir) > reached + 300, process)  # noqa: B023
        time.sleep(0.013)  # somewhere in an iteration
        process.kill()
        assert finish(process).returncode == -signal.SIGKILL
        assert steps_saved(run_dir) > reached + 300 and steps_saved(run_dir) % 64 == 0
        reached = steps_saved(run_dir)
    wall_seconds = read_checkpoint(run_dir)["wall_seconds"]
    assert resume_to_end(cli, run_dir, reached)["wall_seconds"] > wall_seconds


CRASH = """
import os, runpy, signal, sys
calls, limit = [], int(sys.argv.pop(1))
def fsync(file):
    calls.append(file)
    if len(calls) > limit:  # the machine goes down before all of the file is on the disk
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync, sys.argv = fsync, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("files", [0, 2, 3, 5])
def test_kill_9_while_a_file_is_written(files, cli, tmp_path):
    """Half a file is never taken for the whole: there is the one before, or none, and a run goes on from either."""
    command = [sys.executable, "-c", CRASH, str(files), script("ppo"), *tiny("ppo"), *endless]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run_dir = tmp_path / "run"
    assert steps_saved(run_dir) == {0: -1, 2: -1, 3: 0}.get(files, steps_saved(run_dir))
    if files >= 2:  # settings and script are there: without a first checkpoint the run begins again
        resume_to_end(cli, run_dir, max(0, steps_saved(run_dir)))
    else:
        check_failure(cli("ppo", "--resume", "run"), "--resume", "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


@each_agent
def test_stopped_before_the_end_leaves_a_summary(agent, tmp_path):
    """A stop ends training after an iteration and skips the score, also where a film was asked for."""
    module = agent_named(agent)
    argv = [*tiny(agent, run_dir=tmp_path / "run"), "--video"]
    summary = module.main(module.parse_args(argv), [signal.SIGTERM])
    assert summary["stopped_by"] == "SIGTERM" and summary == strict_json((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["global_step"] < whole_steps(agent, argv)
    assert read_checkpoint(tmp_path / "run")["global_step"] == summary["global_step"]


@each_agent
def test_non_finite_loss_ends_a_run(agent, cli, tmp_path, monkeypatch, capfd):
    """A loss that is not finite ends the run with a sentence, and the checkpoint from before it can be resumed."""
    module, argv = agent_named(agent), tiny(agent, run_dir=tmp_path / "run", checkpoint_minutes=0)
    total, steps, make_envs = whole_steps(agent, argv), [0], module.make_envs

    def make_spoilt_envs(*arguments, **options):
        envs = make_envs(*arguments, **options)
        step = envs.step

        def spoilt_step(actions):
            obs, rewards, *rest = step(actions)
            steps[0] += len(rewards)
            return obs, rewards * float("nan") if steps[0] > 0.6 * total else rewards, *rest

        envs.step = spoilt_step
        return envs

    monkeypatch.setattr(module, "make_envs", make_spoilt_envs)
    with pytest.raises(SystemExit) as end:
        module.main(module.parse_args(argv))
    out, err = capfd.readouterr()
    flag = "--learning-rate" if "learning_rate" in settings(agent) else "--q-lr"
    check_failure(Result(end.value.code, out, err), "not finite", flag, status=1)
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
        "ppo", "--resume", "run", *flags(total_timesteps=1000), cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    check_failure(result, "checkpoint.pt", status=1)
    after = contents(run_dir)
    assert {name: after.get(name) for name in before if name != "config.json"} == {
        name: content for name, content in before.items() if name != "config.json"
    }
    assert after.keys() == before.keys()


def test_disk_that_fills_up_while_training(cli, tmp_path, monkeypatch):
    """A disk that is full in the middle of training ends the run in one sentence, on a line of its own."""
    fsync, calls = os.fsync, []

    def full_fsync(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(file)

    monkeypatch.setattr(os, "fsync", full_fsync)
    result = cli("ppo", *tiny("ppo", run_dir="run", checkpoint_minutes=0))
    monkeypatch.undo()
    run_dir = tmp_path / "run"
    assert 0 < steps_saved(run_dir) < 256
    assert not list(run_dir.glob("*.tmp")) and not (run_dir / "summary.json").exists()
    check_failure(result, "checkpoint.pt", os.strerror(errno.ENOSPC), status=1)


def test_full_disk_for_the_curves(tmp_path):
    """Where the event file does not fit on the disk any more, the run ends in one sentence as well."""
    if not resource:
        pytest.skip("needs resource limits")
    room = 60_000  # a few hundred iterations' curves
    assert script("ppo").stat().st_size < room
    argv = tiny("ppo", run_dir="run", num_envs=2, num_steps=8, update_epochs=1, total_timesteps=20_000)
    result = run_agent(
        "ppo", *argv, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    assert steps_saved(tmp_path / "run") >= 0 and not list((tmp_path / "run").glob("*.tmp"))
    check_failure(result, status=1)
