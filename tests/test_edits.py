"""What a stranger does to a copy of agents/ppo.py: another network, a loss more, an environment of one's own.

Each edit is small, and the copy runs in eager and compiled mode and learns.
"""

import difflib
import importlib.util
import inspect
import sys
from unittest import mock

import pytest
import torch
from conftest import has_compiler, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SOURCE = script("ppo").read_text()

NETWORK = '''class Agent(nn.Module):
    """A policy and a value function on one network of rectifiers, with a skip connection."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int):
        super().__init__()
        self.first, self.second = (layer_init(nn.Linear(n, 96)) for n in (*obs_shape, 96))
        self.actor, self.critic = layer_init(nn.Linear(96, num_actions), 0.01), layer_init(nn.Linear(96, 1), 1)

    def hidden(self, obs):
        x = self.first(obs.float()).relu()
        return x + self.second(x).relu()

    def policy(self, obs):
        return self.actor(self.hidden(obs))

    def forward(self, obs):
        hidden = self.hidden(obs)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)
'''

LOSS = {  # the pole's angle, which the critic is to know as well
    "        self.actor, self.critic = network(num_actions, std=0.01), network(1, std=1)\n": """\
        self.actor, self.critic = network(num_actions, std=0.01), network(1, std=1)
        self.angle = layer_init(nn.Linear(64, 1), 0.01)
""",
    """    metrics["clipfrac"] = (clipped != ratio).float() @ weights
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy, metrics
""": """    metrics["clipfrac"] = (clipped != ratio).float() @ weights
    angle = agent.angle(agent.critic[:-1](obs)).squeeze(-1)
    angle_loss = metrics["angle_loss"] = (angle - 10 * obs[:, 2]).square() @ weights
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy + angle_loss, metrics
""",
}

ENVS = {  # by README's recipe: gymnasium's vector environments instead of envpool's
    SOURCE[SOURCE.index("    import envpool\n") : SOURCE.index("\n\ndef check_envs")]: """\
    envs = gymnasium.make_vec("CartPole-v1", num_envs, "sync", **extra)
    envs.reset(seed=seed)
    return envs
""",
}


def rewrite(edits: dict) -> str:
    """agents/ppo.py with passages replaced."""
    source = SOURCE
    for old, new in edits.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def changed_lines(source: str) -> int:
    """How many lines a user had to write or change; those that are deleted cost nothing."""
    lines = difflib.ndiff(SOURCE.splitlines(), source.splitlines())
    return sum(line.startswith("+ ") for line in lines)


def run_copy(folder, source, **settings):
    """Train the copy, in this process; returns the module and the summary."""
    (folder / "my_ppo.py").write_text(source)
    spec = importlib.util.spec_from_file_location("my_ppo", folder / "my_ppo.py")
    module = sys.modules["my_ppo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.main(module.Args(run_dir=str(folder / "run"), device="cpu", eval_episodes=10, **settings))


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
modes = pytest.mark.parametrize(
    "mode", ["eager", "traced", pytest.param("compile", marks=[needs_compiler, pytest.mark.slow])]
)


def learn(folder, mode, source, steps=30_000):
    """Train long enough to see that CartPole is learnt, not to master it: random actions reach some 22."""
    traced = mock.patch.object(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    real = torch.compile
    torch._dynamo.reset()
    if mode == "traced":  # compile without the writing of kernels
        with traced:
            module, summary = run_copy(folder, source, mode="compile", total_timesteps=steps)
    else:
        module, summary = run_copy(folder, source, mode=mode, total_timesteps=steps)
    assert summary["global_step"] > 0.9 * steps and summary["agent"] == "my_ppo"
    assert summary["train_return_mean"] > 60 and summary["eval_return_mean"] > 60, summary
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    return module, events


@modes
def test_another_network(mode, tmp_path):
    """One class, with any methods besides: nothing else knows what it is made of."""
    agent = SOURCE[SOURCE.index("class Agent(nn.Module)") : SOURCE.index("\n\n# ---- algorithm ----")]
    module, _ = learn(tmp_path, mode, rewrite({agent: NETWORK}))
    assert "rectifiers" in module.Agent.__doc__


@modes
def test_an_auxiliary_loss(mode, tmp_path):
    """A head, its loss and a curve of it in at most six lines, and the head does learn."""
    source = rewrite(LOSS)
    assert 0 < changed_lines(source) <= 6
    _, events = learn(tmp_path, mode, source)
    losses = [point.value for point in events.Scalars("losses/angle_loss")]
    assert len(losses) > 5 and losses[-1] < 0.5 * losses[0]


@modes
def test_an_environment_of_ones_own(mode, tmp_path):
    """gymnasium's vector environments in at most eight lines."""
    source = rewrite(ENVS)
    assert 0 < changed_lines(source) <= 8
    module, _ = learn(tmp_path, mode, source)
    assert "gymnasium.make_vec" in inspect.getsource(module.make_envs)
