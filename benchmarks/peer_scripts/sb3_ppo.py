"""Steps per second of Stable-Baselines3's PPO.

Runs in the peer's environment, started by benchmarks/peers.py with the settings in JSON; prints the SPS last.
"""

import json
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def main(settings: dict) -> float:
    if settings["torch_threads"]:
        torch.set_num_threads(settings["torch_threads"])
    if atari := "NoFrameskip" in settings["env_id"]:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(settings["env_id"], n_envs=settings["num_envs"], seed=1), 4)
    else:
        envs = make_vec_env(settings["env_id"], n_envs=settings["num_envs"], seed=1)
    if settings["normalize"]:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    batch_size, clip = settings["num_envs"] * settings["num_steps"], settings["clip_coef"]
    model = PPO(
        "CnnPolicy" if atari else "MlpPolicy", envs, n_steps=settings["num_steps"], n_epochs=settings["update_epochs"],
        batch_size=batch_size // settings["num_minibatches"], learning_rate=settings["learning_rate"],
        ent_coef=settings["ent_coef"], vf_coef=settings["vf_coef"], max_grad_norm=settings["max_grad_norm"],
        gae_lambda=settings["gae_lambda"], gamma=settings["gamma"], clip_range=clip, clip_range_vf=clip, device="cpu",
        seed=1,
    )  # fmt: skip
    model.learn(batch_size)  # the first iteration warms up
    done, start = model.num_timesteps, time.perf_counter()
    model.learn(settings["steps"], reset_num_timesteps=False)
    return (model.num_timesteps - done) / (time.perf_counter() - start)


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
