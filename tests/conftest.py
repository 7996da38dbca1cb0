"""Helpers that the tests share: which agents there are, how to run one, how to make any of them tiny."""

import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "agents").glob("*.py"))

# Smallest value of each setting that still exercises it; an agent gets those that its Args has.
SMALL = {
    "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 2, "torch_threads": 1,
    "env_threads": 1, "learning_rate": 0.01, "buffer_size": 1024, "batch_size": 16, "learning_starts": 64,
    "target_network_frequency": 20, "num_iterations_obs_norm_init": 1,
}  # fmt: skip
SMALL_ATARI = {"env_id": "Breakout-v5", "num_envs": 2, "frame_skip": 16, "update_epochs": 1, "learning_rate": 0.001}
SMALL_ATARI |= {"end_e": 0.3}  # for scores other than 0
SMALL_ATARI |= {"episodic_life": True, "sticky_actions": 0.0}  # then envpool presses FIRE in every life, and it counts
SMALL_CONTINUOUS = {"env_id": "LunarLanderContinuous-v3", "num_steps": 64}  # quick to end, and to draw
SMALL_CONTINUOUS |= {"learning_starts": 600}  # some games
KEPT = {".lock", "config.json", "checkpoint.pt", "summary.json"}  # beside the event file and the copy of the script


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU on a machine without one, and what is slow unless it is asked for."""
    slow = config.getoption("--slow") or "slow" in config.getoption("markexpr")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with --slow or -m slow"))


@pytest.fixture(autouse=True)
def same_precision():
    """What the agents set for their process is as before after every test."""
    backends = [torch.backends, torch.backends.mkldnn, torch.backends.cudnn]
    before = [b.fp32_precision for b in backends], torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    for backend, precision in zip(backends, before[0]):
        backend.fp32_precision = precision
    torch.set_num_threads(before[1])
    torch.backends.cudnn.benchmark = before[2]
    torch.set_flush_denormal(False)


# ---- agents ----------------------------------------------------------------------------------------------------------


def script(agent: str) -> Path:
    """The file of an agent."""
    return ROOT / "agents" / f"{agent}.py"


@functools.cache
def agent_named(agent: str):
    """An agent's file as a module, imported by its path."""
    spec = importlib.util.spec_from_file_location(agent, script(agent))
    module = sys.modules[agent] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AGENTS = [agent_named(name) for name in NAMES]


def agents_with(*names: str) -> list:
    """Parameters for the agents that have all these top-level names."""
    chosen = [module for module in AGENTS if all(hasattr(module, name) for name in names)]
    return [pytest.param(module, id=module.__name__) for module in chosen]


def first_fast(*names: str) -> list:
    """agents_with(*names), slow but for the first: what is tested is the same code in all of them."""
    first, *others = (case.values[0] for case in agents_with(*names))
    slow = [pytest.param(module, id=module.__name__, marks=pytest.mark.slow) for module in others]
    return [pytest.param(first, id=first.__name__), *slow]


# Agents whose run folder, checkpoint and command line are those of others to the letter: there, testing these is slow.
ALIKE = {"ppo_atari", "ppo_atari_lstm", "ppo_continuous_action", "pqn", "pqn_atari", "dqn_atari", "sac_atari", "c51"}
ALIKE |= {"rainbow_atari", "pqn_atari_lstm", "td3_continuous_action", "rpo_continuous_action"}
ALIKE |= {"ddpg_continuous_action", "ppo_rnd_atari"}


def slow_unless_new(alike=ALIKE) -> list:
    """Parameters for all agents, slow those that other agents stand for; an agent that is not in the list is not."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in alike)) for name in NAMES]


def continuous(agent: str) -> bool:
    """Whether the agent's actions are vectors of real numbers."""
    return "continuous" in agent


def settings(agent: str) -> set[str]:
    """Names of the settings that the agent's command line has."""
    return {field.name for field in fields(agent_named(agent).Args)}


def flags(**values) -> list[str]:
    """Command line flags: run_dir="x", video=True, anneal_lr=False -> --run-dir x --video --no-anneal-lr."""
    argv = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        argv += [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return argv


def tiny(agent: str, **changes) -> list[str]:
    """Flags that make any agent small: four updates' worth of steps and a remainder, on the CPU, in eager mode."""
    small = SMALL | (SMALL_ATARI if "atari" in agent else SMALL_CONTINUOUS if continuous(agent) else {})
    small = {name: value for name, value in small.items() if name in settings(agent)} | {"device": "cpu"} | changes
    if "num_steps" in small:
        steps = 4 * max(1, small["num_envs"]) * max(1, small["num_steps"]) + 3
    else:
        steps = small.get("learning_starts", 0) + 64 * max(1, small["num_envs"]) + 3
    return flags(**{"total_timesteps": steps, "mode": "eager"} | small)


def tiny_args(module, folder, **changes):
    """Settings for a few iterations of an agent, in this process."""
    return module.parse_args(tiny(module.__name__, run_dir=str(folder / "run"), **changes))


def whole_steps(agent: str, argv: list[str]) -> int:
    """The environment steps that a run of these flags takes: total_timesteps, rounded down to whole iterations."""
    args = agent_named(agent).parse_args(argv)
    iteration = args.num_envs * getattr(args, "num_steps", 1)
    return args.total_timesteps // iteration * iteration


# ---- running one -----------------------------------------------------------------------------------------------------


def strict_json(line: str):
    """Parse JSON as the standard has it, without NaN and Infinity."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@dataclass
class Result:
    """What a process ended with."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """Lines of stderr, less the progress bar, which draws itself over and over after a carriage return."""
        lines = [line for line in re.split("[\r\n]+", self.stderr) if line.strip()]
        return [line for line in lines if not re.search(r"\d+%\|.*\]$", line.rstrip())]


def final_json(result: Result) -> dict:
    """The summary in the last line of stdout."""
    assert result.returncode == 0, result.stderr
    return strict_json(result.stdout.splitlines()[-1])


def start_agent(agent: str, *argv, cwd: Path | None = None, **options) -> subprocess.Popen:
    """Start an agent through its command line, as a user does."""
    command = [sys.executable, str(script(agent)), *map(str, argv)]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **options
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> Result:
    """Wait for a started agent; one that hangs is ended and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, stdout, stderr)


def run_agent(agent: str, *argv, cwd: Path | None = None, **options) -> Result:
    """Run an agent through its command line to its end."""
    return finish(start_agent(agent, *argv, cwd=cwd, **options))


def call_main(agent: str | Path, argv, cwd: Path) -> int:
    """Run an agent, or a file, as `__main__` inside this process: the command line without seconds of imports.

    An exception that a user would see as a traceback comes out as itself and fails the test.
    """
    path = str(agent if isinstance(agent, Path) else script(agent))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():  # as outside of pytest: shown on stderr
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [path, *map(str, argv)])
        patch.setattr(os, "_exit", sys.exit)
        patch.setattr(threading, "excepthook", threading.excepthook)
        try:
            runpy.run_path(path, run_name="__main__")
            return 0
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def cli(tmp_path, capfd):
    """cli(agent, *argv) runs it in this process, in the folder tmp_path, and returns what it ended with."""

    def call(agent: str | Path, *argv) -> Result:
        capfd.readouterr()
        status = call_main(agent, argv, tmp_path)
        return Result(status, *capfd.readouterr())

    return call


# ---- finished runs ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run and how it was started."""

    agent: str
    argv: list[str]
    path: Path
    result: Result

    def copy(self, path: Path) -> Path:
        """A copy of the run folder, to be changed."""
        shutil.copytree(self.path, path)
        return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """runs(agent): a finished tiny run of it, made once for the whole session, in this process."""

    @functools.cache
    def make(agent: str) -> Run:
        cwd, argv = tmp_path_factory.mktemp(agent), tiny(agent, seed=1, run_dir="run")
        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            status = call_main(agent, argv, cwd)
        return Run(agent, argv, cwd / "run", Result(status, stdout.getvalue(), stderr.getvalue()))

    return make


@pytest.fixture(scope="session")
def compiler_cache(tmp_path_factory):
    """A folder for what the compiler keeps, empty at first; headers are compiled into it once for all tests."""
    return tmp_path_factory.mktemp("inductor")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes, but for what Python keeps of imports."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_checkpoint(run_dir: Path) -> dict:
    """A run's checkpoint, checked to be loadable without running code from it, with finite weights."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert checkpoint["agent"] and all(x.isfinite().all() for x in checkpoint["agent"].values())
    return checkpoint


def same_weights(one: dict, other: dict) -> bool:
    """Whether two checkpoints hold bit-equal networks."""
    a, b = one["agent"], other["agent"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def has_compiler() -> bool:
    """Whether torch.compile can work here: it needs a C++ compiler and Python.h, on a GPU as well."""
    return AGENTS[0].can_compile()
