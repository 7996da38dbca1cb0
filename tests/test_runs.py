"""Every agent through its command line, in every mode the machine has: it trains, and leaves what it promises."""

import functools
import json
import math
import os
import signal
from dataclasses import asdict

import pytest
import torch
from conftest import (
    KEPT,
    NAMES,
    agent_named,
    contents,
    final_json,
    has_compiler,
    read_checkpoint,
    run_agent,
    same_weights,
    script,
    settings,
    slow_unless_new,
    strict_json,
    tiny,
    whole_steps,
)
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SUMMARY_KEYS = {
    "agent", "env_id", "seed", "device", "mode", "torch", "num_envs", "global_step", "wall_seconds", "compile_seconds",
    "sps", "sps_rollout", "sps_update", "train_return_mean", "eval_return_mean", "eval_return_std", "eval_episodes",
    "eval_returns", "notes", "stopped_by", "run_dir",
}  # fmt: skip
each_agent = pytest.mark.parametrize("agent", NAMES)
each_kind = pytest.mark.parametrize("agent", slow_unless_new())


def check_run(agent, argv, cwd, result, device, mode):
    """What every finished run must have left, however it was run."""
    summary = final_json(result)
    assert len(result.stdout.splitlines()) == 1, "stdout holds more than the summary"
    run_dir = cwd / summary["run_dir"]
    assert summary == strict_json((run_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    steps, args = whole_steps(agent, argv), agent_named(agent).parse_args(argv)
    expected = {"agent": agent, "device": device, "mode": mode, "torch": torch.__version__, "global_step": steps}
    expected |= {"stopped_by": None}
    expected |= {name: getattr(args, name) for name in ("env_id", "seed", "num_envs", "eval_episodes")}
    assert {name: summary[name] for name in expected} == expected
    parts = [summary["sps_rollout"], summary["sps_update"]]
    if device.startswith("cuda") and "buffer_size" in settings(agent):  # a GPU learns while the environments step
        assert parts == [None, None]
        parts = []
    for value in (summary["wall_seconds"], summary["sps"], *parts):
        assert 0 < value < math.inf
    assert 1 / summary["sps"] >= 0.9 * sum(1 / part for part in parts)  # parts of the whole
    assert 0 <= summary["compile_seconds"] < summary["wall_seconds"]
    assert math.isfinite(summary["eval_return_mean"]) and summary["eval_return_std"] >= 0
    assert math.isfinite(summary["train_return_mean"])  # the settings are such that a game ends in training
    assert read_checkpoint(run_dir)["global_step"] == steps
    return summary, run_dir


@pytest.fixture(scope="module")
def again(runs, tmp_path_factory):
    """again(agent): the same settings as runs(agent), called as a function in this process.

    Returns the summary, the folder and the network of every checkpoint that was written on the way. Another seed is
    stopped after an iteration.
    """

    @functools.cache
    def make(agent, seed=1):
        module, written, save = agent_named(agent), [], torch.save
        folder = tmp_path_factory.mktemp(agent) / "run"

        def record(state, file):
            written.append((state["global_step"], {name: x.clone() for name, x in state["agent"].items()}))
            return save(state, file)

        argv = [*runs(agent).argv, "--run-dir", str(folder), "--seed", str(seed)]
        argv += ["--checkpoint-minutes", "0"] if "buffer_size" not in settings(agent) else []  # which has many more
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", record)
            summary = module.main(module.parse_args(argv), [] if seed == 1 else [signal.SIGTERM])
        return summary, folder, written

    return make


@each_agent
def test_trains_eagerly(agent, runs):
    """An agent runs from start to end, and its summary is complete and true."""
    done = runs(agent)
    check_run(agent, done.argv, done.path.parent, done.result, "cpu", "eager")


@each_agent
def test_leaves_its_files(agent, runs):
    """A run folder holds what is promised, no more, is free again, and has the settings of the run."""
    done = runs(agent)
    with FileLock(done.path / ".lock", blocking=False):
        pass
    names = {path.name for path in done.path.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1 and names == KEPT | {f"{agent}.py"} | events
    assert (done.path / f"{agent}.py").read_bytes() == script(agent).read_bytes()
    config = json.loads((done.path / "config.json").read_text())
    assert config.keys() == {"agent", "args", "network"}
    settings = asdict(agent_named(agent).parse_args(done.argv)) | dict.fromkeys(("run_dir", "resume", "evaluate"))
    assert config["agent"] == agent and config["args"] == settings
    agent_named(agent).Agent(**config["network"]).load_state_dict(read_checkpoint(done.path)["agent"])


@each_agent
def test_logs_curves(agent, runs):
    """TensorBoard finds the curves under CleanRL's names, with finite values, up to the last step."""
    done = runs(agent)
    events = EventAccumulator(str(done.path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"charts/SPS", "charts/episodic_return"} and any(tag.startswith("losses/") for tag in tags)
    if agent.startswith("ppo"):
        assert tags >= {"losses/policy_loss", "losses/value_loss", "losses/entropy", "charts/learning_rate"}
    if agent.startswith("pqn"):
        assert tags >= {"losses/td_loss", "losses/q_values", "charts/epsilon", "charts/learning_rate"}
    if agent.startswith(("dqn", "c51")):
        assert tags >= {"losses/td_loss", "losses/q_values", "charts/epsilon", "charts/learning_rate"}
    assert ("losses/grad_norm" in tags) == ("max_grad_norm" in settings(agent))
    if agent.startswith(("sac", "td3", "ddpg")):
        assert tags >= {"losses/q_loss", "losses/q_values", "losses/policy_loss"}
    for tag in tags:
        steps = [point.step for point in events.Scalars(tag)]
        assert steps == sorted(set(steps)) and all(math.isfinite(point.value) for point in events.Scalars(tag))
    assert events.Scalars("charts/SPS")[-1].step == final_json(done.result)["global_step"]
    assert len(events.Scalars("charts/SPS")) >= 2


@each_kind
def test_weights_move_and_seed_decides(agent, runs, again):
    """Training moves every parameter; the same seed gives the same bits, another does not."""
    summary, folder, written = again(agent)
    (step, first), final = written[0], read_checkpoint(folder)
    assert step == 0 and len(written) >= (2 if "buffer_size" in settings(agent) else 3)  # one after every update
    assert first.keys() == final["agent"].keys()
    still = {key for key in first if torch.equal(first[key], final["agent"][key])}
    still = {key for key in still if not key.startswith("target.")}  # RND's, which is fixed
    assert still <= {"low", "high", "atoms"}  # limits of actions, returns

    done = runs(agent)
    assert same_weights(final, read_checkpoint(done.path))
    for name in ("train_return_mean", "eval_return_mean", "eval_return_std"):
        assert summary[name] == final_json(done.result)[name], name
    other, _, others = again(agent, seed=2)
    matrices = [name for name, x in first.items() if x.dim() > 1 and not name.endswith("weight_sigma")]  # constants
    assert other["seed"] == 2 and not any(torch.equal(first[name], others[0][1][name]) for name in matrices)


@pytest.mark.parametrize("agent", slow_unless_new(set(NAMES) - {"ppo"}))
def test_a_process_of_its_own_does_the_same(agent, runs, tmp_path):
    """What the other tests see inside this process is what a user sees: the same bits and the same files."""
    done = runs(agent)
    result = run_agent(agent, *done.argv, cwd=tmp_path)
    summary, run_dir = check_run(agent, done.argv, tmp_path, result, "cpu", "eager")
    assert same_weights(read_checkpoint(run_dir), read_checkpoint(done.path))
    for name in ("train_return_mean", "eval_returns"):
        assert summary[name] == final_json(done.result)[name], name


@each_kind
def test_films_an_episode(agent, runs, cli, tmp_path):
    """--video leaves an animated picture that moves."""
    folder = runs(agent).copy(tmp_path / "run")
    assert final_json(cli(agent, "--evaluate", "run", "--video", "--eval-episodes", 0))["eval_return_mean"] is None
    with Image.open(folder / "episode.gif") as film:
        assert film.format == "GIF" and film.is_animated and film.n_frames > 1
        first = film.convert("RGB").tobytes()
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").tobytes() != first
    assert not list(folder.glob("*.tmp"))


@each_kind
def test_evaluates_a_run(agent, runs, cli, tmp_path):
    """--evaluate scores the trained weights as the run itself did, every time the same, and changes no file."""
    done = runs(agent)
    before, modified = contents(done.path), {path: path.stat().st_mtime_ns for path in done.path.iterdir()}
    argv = ["--evaluate", str(done.path)]
    result = cli(agent, *argv)
    assert len(result.stdout.splitlines()) == 1
    trained, first = final_json(done.result), final_json(result)
    for name in ("agent", "env_id", "seed", "global_step", "eval_episodes", "eval_return_mean", "eval_return_std"):
        assert trained[name] == first[name], name
    assert contents(done.path) == before and not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in done.path.iterdir()} == modified

    # the score is that of the weights in the checkpoint: with others it is another
    broken, others = done.copy(tmp_path / "run"), []
    for number in (0, -1):
        checkpoint = read_checkpoint(done.path)
        for name, weights in checkpoint["agent"].items():
            if name in ("low", "high"):  # bounds of the actions, which belong to the environment
                continue
            weights.zero_()
            if weights.dim() == 1 and weights.numel() > 1:
                weights[number] = 100  # a policy that always takes its first action, or its last
        torch.save(checkpoint, broken / "checkpoint.pt")
        others.append(final_json(cli(agent, "--evaluate", broken))["eval_returns"])
        if others[-1] != first["eval_returns"]:
            break
    assert others[-1] != first["eval_returns"] and len(others[-1]) == first["eval_episodes"]


@pytest.mark.slow
@each_agent
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_trains_compiled(agent, tmp_path, compiler_cache):
    """The compiled mode of the CPU runs from start to end, does compile, and its compilation is counted apart."""
    # what RPO compiles is what ppo_continuous_action compiled before it
    cache = tmp_path / "cache" if agent == "rpo_continuous_action" else compiler_cache
    argv, before = tiny(agent, mode="compile", eval_episodes=1, run_dir="run"), set(cache.rglob("*.so"))
    result = run_agent(agent, *argv, cwd=tmp_path, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    summary, _ = check_run(agent, argv, tmp_path, result, "cpu", "compile")
    assert set(cache.rglob("*.so")) > before, "nothing was compiled"
    assert summary["compile_seconds"] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", "eager", "compile", "cudagraphs", "compile-cudagraphs"])
@each_agent
def test_trains_on_gpu(agent, mode, tmp_path):
    """Every mode of a CUDA device runs from start to end, and auto is one of them."""
    argv = tiny(agent, mode=mode, device="cuda", run_dir="run")
    result = run_agent(agent, *argv, cwd=tmp_path)
    expected = final_json(result)["mode"] if mode == "auto" else mode
    check_run(agent, argv, tmp_path, result, "cuda:0", expected)
    assert expected in ("eager", "compile", "cudagraphs", "compile-cudagraphs")


def test_c51_takes_new_bounds_behind_evaluate(runs, cli, monkeypatch):
    """The atoms are those of the flags, not those that the checkpoint has."""
    done, module, atoms = runs("c51"), agent_named("c51"), []
    monkeypatch.setattr(module, "evaluate", lambda agent, *_: atoms.extend(agent.atoms.tolist()) or [1.0])
    module.main(module.parse_args(["--evaluate", str(done.path), "--v-min", "-7", "--v-max", "9"]))
    assert (atoms[0], atoms[-1], len(atoms)) == (-7, 9, 101)
