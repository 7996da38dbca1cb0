"""README's snippets run: the edits on a copy of a file, and a trained agent played elsewhere."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, agent_named, flags, script

README = (ROOT / "README.md").read_text()
SMALL = {"total_timesteps": 4096, "num_envs": 8, "num_steps": 64, "eval_episodes": 1, "mode": "eager", "run_dir": "run"}


def snippet(title: str) -> str:
    """The text of the code block whose first line is this comment."""
    return re.search(rf"```(?:python|diff)\n# {title}\n(.*?)```", README, flags=re.DOTALL)[1]


def edited(title: str) -> str:
    """agents/ppo.py after the snippet's edit."""
    source, edit = script("ppo").read_text(), snippet(title)
    if "\n-" not in f"\n{edit}":  # a whole function, in place of the one of its name
        name = re.match(r"def (\w+)", edit)[1]
        return re.sub(rf"(?ms)^def {name}\(.*?(?=^def )", lambda _: edit + "\n\n", source)
    lines = [line for line in edit.splitlines() if line[:1] in " -+"]
    before = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    assert source.count(before) == 1, before
    return source.replace(before, after)


@pytest.mark.parametrize("title", ["network", "loss", "environment"])
def test_edits_run(title, cli, tmp_path):
    (tmp_path / "mine.py").write_text(edited(title))
    result = cli(tmp_path / "mine.py", *flags(**SMALL))
    assert result.returncode == 0, result.stderr
    event_file = next((tmp_path / "run").glob("events*")).read_bytes()
    assert (b"losses/value_size" in event_file) == (title == "loss")


def player(agent: str, env_id: str, *changes) -> str:
    """README's lines for a run of the agent, with the changes that README names."""
    code = snippet("play").replace("runs/my-run", agent)
    for old, new in (("CartPole-v1", env_id), *changes):
        assert old in code
        code = code.replace(old, new)
    return code


def test_trained_agents_play_elsewhere(cli, tmp_path):
    """One process plays a discrete, a continuous and an Atari agent, one after another: each takes seconds to start."""
    act = "        action = agent(torch.as_tensor(obs)[None])[0].argmax(-1).item()\n"
    atari = snippet("environment: Atari").replace("frameskip=4", "frameskip=4, max_episode_steps=200")
    code = player("ppo", "CartPole-v1")
    code += player("ppo_continuous_action", "Pendulum-v1", (act, f"        {snippet('act: continuous')}"))
    code += player("ppo_atari", "Pong-v5", ('env = gymnasium.make("Pong-v5")\n', atari))
    small = SMALL | {"eval_episodes": 0}
    runs = {"ppo": small, "ppo_continuous_action": small | {"env_id": "Pendulum-v1"}}
    runs["ppo_atari"] = small | {"num_envs": 2, "num_steps": 16, "total_timesteps": 64}
    for agent, settings in runs.items():
        assert cli(agent, *flags(**settings | {"run_dir": agent})).returncode == 0
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    cartpole, pendulum, pong = map(float, result.stdout.splitlines()[-3:])
    assert 8 <= cartpole <= 500 and -2200 < pendulum < 0 and -21 <= pong <= 21


def test_every_agent_and_flag_in_readme_exists():
    names = set(re.findall(r"agents/(\w+)\.py", README))
    assert names and all(script(name).exists() for name in names)
    known = {name.replace("_", "-") for agent in names for name in vars(agent_named(agent).Args())}
    tables = "\n".join(line for line in README.splitlines() if line.startswith("| `--"))
    assert {flag for flag in re.findall(r"`--([a-z-]+)", tables)} <= known
