"""The rules of the house: equal names are equal code, equal flags mean the same, copies run anywhere."""

import ast
import dataclasses
import functools
import re
import sys
import tomllib
from itertools import combinations

import pytest
from conftest import AGENTS, NAMES, ROOT, script

MAY_DIFFER = {
    "Args", "LIMITS", "METRICS", "CPU_MODE", "make_envs", "true_game", "Actor", "Agent", "QNetwork", "Rollout",
    "draw_noise", "sample_actions", "act_step", "collect", "evaluate_actions", "train_step", "update", "evaluate",
    "accelerate", "check_sizes", "main",
}  # fmt: skip
FILES = [script(name) for name in NAMES]
PAIRS = list(combinations(FILES, 2))


@functools.cache
def definitions(path):
    """Source of every top-level function, class and constant by name."""
    source = path.read_text()
    nodes = ast.parse(source).body
    named = [(node.name, node) for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    named += [(node.targets[0].id, node) for node in nodes if isinstance(node, ast.Assign)]
    return {name: ast.get_source_segment(source, node) for name, node in named}


@functools.cache
def args_of(path):
    """The syntax of the fields of Args, each followed by its docstring."""
    return next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == "Args").body


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda path: path.stem)
def test_equal_names_are_equal_code(first, second):
    ours, theirs = definitions(first), definitions(second)
    for name in (ours.keys() & theirs.keys()) - MAY_DIFFER:
        assert ours[name] == theirs[name], f"{name} differs between {first.name} and {second.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_flag_is_explained(path):
    body = args_of(path)
    for field, following in zip(body, [*body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(following, ast.Expr) and isinstance(following.value.value, str), field.target.id


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda path: path.stem)
def test_a_shared_flag_has_one_type_and_one_help(first, second):
    def flags(path):
        pairs = zip(body := args_of(path), body[1:])
        fields = [(field, doc) for field, doc in pairs if isinstance(field, ast.AnnAssign)]
        return {field.target.id: (ast.unparse(field.annotation), doc.value.value) for field, doc in fields}

    ours, theirs = flags(first), flags(second)
    for name in ours.keys() & theirs.keys():
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_pins_what_requirements_pin(path):
    header = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", path.read_text()).group(1)
    dependencies = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(True)))
    requirements = set((ROOT / "requirements.txt").read_text().split())
    assert set(dependencies["dependencies"]) <= requirements
    assert dependencies["requires-python"] == ">=3.11"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agents_import_packages_and_nothing_of_ours(path):
    allowed = {"envpool", "gymnasium", "numpy", "PIL", "torch", "tqdm", "tyro", "wandb"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.split(".")[0]
            assert root in allowed or root in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", AGENTS, ids=NAMES)
def test_limits_name_numbers_that_exist_and_admit_the_defaults(module):
    numbers = {field.name for field in dataclasses.fields(module.Args) if field.type in (int, float)}
    assert module.LIMITS.keys() == numbers
    assert all(low <= getattr(module.Args(), name) <= high for name, (low, high) in module.LIMITS.items())


@pytest.mark.parametrize("module", AGENTS, ids=NAMES)
def test_auto_compiles_only_where_a_compiler_is(module, monkeypatch):
    args = module.Args(device="cpu")
    monkeypatch.setenv("CXX", sys.executable)  # there for certain
    assert module.check_args(args)[1] == module.CPU_MODE
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module.check_args(args)[1] == "eager"
    assert module.check_args(dataclasses.replace(args, mode="compile"))[1] == "compile", "asked for is asked for"
