"""The rules of the house: equal names are equal code, equal flags mean the same, copies run anywhere."""

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import tokenize
import tomllib
from itertools import combinations

import pytest
import torch
from conftest import AGENTS, NAMES, ROOT, agent_named, continuous, read_checkpoint, script, settings

MAY_DIFFER = {
    "Args", "make_envs", "check_envs", "true_game", "Actor", "Critics", "Agent", "QNetwork", "Rollout", "FrameReplay",
    "draw_noise", "sample_actions", "act", "evaluate_actions", "update", "evaluate", "final_score", "accelerate",
    "main",
}  # fmt: skip
FILES = [script(name) for name in NAMES]
PAIRS = list(combinations(FILES, 2))
each_agent = pytest.mark.parametrize("agent", NAMES)


@functools.cache
def definitions(path):
    """Source of every top-level function, class and constant by name."""
    source = path.read_text()
    nodes = ast.parse(source).body
    named = [(node.name, node) for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    named += [(node.targets[0].id, node) for node in nodes if isinstance(node, ast.Assign)]
    starts = {
        name: min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for name, node in named
    }
    lines = source.splitlines()
    return {name: "\n".join(lines[starts[name] - 1 : node.end_lineno]) for name, node in named}


@functools.cache
def flags(path):
    """The fields of Args, each with its type and the comment on its line, which is its help."""
    source = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    body = next(node for node in ast.parse(source).body if getattr(node, "name", None) == "Args").body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: (ast.unparse(field.annotation), comments.get(field.end_lineno)) for field in fields}


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda path: path.stem)
def test_equal_names_are_equal_code(first, second):
    ours, theirs = definitions(first), definitions(second)
    for name in (ours.keys() & theirs.keys()) - MAY_DIFFER:
        assert ours[name] == theirs[name], f"{name} differs between {first.name} and {second.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_flag_is_explained(path, capsys):
    explained = flags(path)
    assert explained.keys() == {field.name for field in dataclasses.fields(agent_named(path.stem).Args)}
    for name, (_, comment) in explained.items():
        assert comment and len(comment) > 10, name
    with pytest.raises(SystemExit):
        agent_named(path.stem).parse_args(["--help"])
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    for name, (_, comment) in explained.items():
        assert re.sub(r"\s", "", comment.removeprefix("#")) in shown, f"--help does not say what {name} is"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_flag_does_something(path):
    _, checks, code = path.read_text().partition("    def __post_init__(self):")
    unused = [name for name in flags(path) if not re.search(rf"\b(args|own|self)\.{name}\b", checks + code)]
    assert not unused, "no line reads these"


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda path: path.stem)
def test_a_shared_flag_has_one_type_and_one_help(first, second):
    ours, theirs = flags(first), flags(second)
    for name in ours.keys() & theirs.keys():
        if name not in ("torch_threads", "env_threads"):  # whose defaults have reasons of their own
            assert ours[name] == theirs[name], name
        assert ours[name][0] == theirs[name][0], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_pins_what_requirements_pin(path):
    header = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", path.read_text()).group(1)
    dependencies = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(True)))
    requirements = set((ROOT / "requirements.txt").read_text().split())
    assert set(dependencies["dependencies"]) <= requirements
    assert dependencies["requires-python"] == ">=3.11"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agents_import_packages_and_nothing_of_ours(path):
    allowed = {"envpool", "gymnasium", "numpy", "PIL", "torch", "tqdm", "tyro", "wandb", "filelock"}
    assert any(line.startswith("filelock") for line in importlib.metadata.requires("torch"))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.split(".")[0]
            assert root in allowed or root in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", AGENTS, ids=NAMES)
def test_evaluate_takes_a_device_that_is_there(module, monkeypatch):
    """A run of cuda:7 plays on a machine with two GPUs, too."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = {device: module.Args(evaluate="run", device=device).device for device in ("cuda:1", "cuda:7", "cpu")}
    assert devices == {"cuda:1": "cuda:1", "cuda:7": "auto", "cpu": "cpu"}


@pytest.mark.parametrize("module", AGENTS, ids=NAMES)
def test_a_gpu_whose_driver_does_not_start_is_none(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.Args().device == "auto"
    with pytest.raises(ValueError, match="must be one of auto, cpu on this machine"):
        module.Args(device="cuda")


@pytest.mark.parametrize("module", AGENTS, ids=NAMES)
def test_auto_needs_no_compiler_on_a_cpu(module, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module.Args(device="cpu").mode == "auto"
    with pytest.raises(ValueError, match="compiler"):
        module.Args(device="cpu", mode="compile")


@pytest.mark.parametrize("agent", [name for name in NAMES if "precision" in settings(name)])
def test_a_gpu_computes_in_bf16_on_atari_and_else_in_tf32(agent):
    assert agent_named(agent).Args().precision == ("tf32" if continuous(agent) else "auto")


def load(path, name):
    """A copy of an agent's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@each_agent
def test_a_trained_agent_loads_without_other_packages(agent, runs, monkeypatch):
    """The copy of the script in the run folder, with torch, numpy and gymnasium alone, builds the trained network."""
    run_dir = runs(agent).path
    for name in "envpool", "tyro", "tensorboard", "torch.utils.tensorboard", "tqdm", "PIL", "wandb", "matplotlib":
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import envpool  # noqa: F401
    module = load(run_dir / f"{agent}.py", "stranger")
    network = module.Agent(**json.loads((run_dir / "config.json").read_text())["network"])
    saved = read_checkpoint(run_dir)["agent"]
    network.load_state_dict(saved)
    assert all(torch.equal(x, saved[name]) for name, x in network.state_dict().items())


@each_agent
def test_imports_on_a_system_without_affinity(agent, monkeypatch):
    """macOS and Windows have no os.sched_getaffinity; Windows has no fcntl either."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    module = load(script(agent), "elsewhere")
    assert module.parse_args([]).env_id == module.Args().env_id
