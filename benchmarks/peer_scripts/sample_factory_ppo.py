"""Steps per second of Sample Factory's PPO, in its synchronous mode and in one process.

Runs in the peer's environment, started by benchmarks/peers.py with the settings in JSON; prints the SPS last.
"""

import json
import sys
import tempfile
import time

import gymnasium
import torch
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner


class Clock(AlgoObserver):
    """Counts steps and time from the end of the first iteration on, which warms up, to that of the last."""

    def __init__(self, batch_size: int):
        self.batch_size, self.times = batch_size, []

    def on_training_step(self, runner, iteration):
        self.times.append(time.perf_counter())

    def sps(self) -> float:
        return (len(self.times) - 1) * self.batch_size / (self.times[-1] - self.times[0])


def make_env(name: str, cfg=None, env_config=None, render_mode: str | None = None) -> gymnasium.Env:
    return gymnasium.make(name, render_mode=render_mode)


def main(settings: dict) -> float:
    if settings["torch_threads"]:
        torch.set_num_threads(settings["torch_threads"])
    register_env(settings["env_id"], make_env)
    batch_size = settings["num_envs"] * settings["num_steps"]
    flags = {
        "env": settings["env_id"], "device": "cpu", "seed": 1, "train_for_env_steps": batch_size + settings["steps"],
        "async_rl": False, "serial_mode": True, "num_workers": 1, "worker_num_splits": 1, "with_vtrace": False,
        "num_envs_per_worker": settings["num_envs"], "rollout": settings["num_steps"], "use_rnn": False,
        "batch_size": batch_size // settings["num_minibatches"], "num_batches_per_epoch": settings["num_minibatches"],
        "num_epochs": settings["update_epochs"], "shuffle_minibatches": True, "gamma": settings["gamma"],
        "gae_lambda": settings["gae_lambda"], "learning_rate": settings["learning_rate"], "adam_eps": 1e-5,
        "ppo_clip_ratio": settings["clip_coef"], "ppo_clip_value": settings["clip_coef"], "nonlinearity": "tanh",
        "exploration_loss_coeff": settings["ent_coef"], "value_loss_coeff": settings["vf_coef"],
        "max_grad_norm": settings["max_grad_norm"], "actor_critic_share_weights": False, "normalize_input": False,
        "normalize_returns": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        argv = [f"--{name}={value}" for name, value in (flags | {"train_dir": folder}).items()]
        parser, _ = parse_sf_args([*argv, "--encoder_mlp_layers", "64", "64"])
        cfg, runner = make_runner(parse_full_cfg(parser, [*argv, "--encoder_mlp_layers", "64", "64"]))
        runner.register_observer(clock := Clock(batch_size))
        runner.init()
        runner.run()
    return clock.sps()


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
