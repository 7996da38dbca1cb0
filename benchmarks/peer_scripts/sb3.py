"""Steps per second of Stable-Baselines3's agents.

Runs in the peer's environment, started by benchmarks/peers.py with the settings in JSON; prints the SPS last.
"""

import json
import sys
import time

import torch
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
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
    policy = "CnnPolicy" if atari else "MlpPolicy"
    if settings["algorithm"] == "ppo":
        model, warm_up = ppo(settings, policy, envs), settings["num_envs"] * settings["num_steps"]
    else:
        model, warm_up = off_policy(settings, policy, envs), settings["learning_starts"] + 100
    model.learn(warm_up)  # the first iteration, or what comes before learning
    done, start = model.num_timesteps, time.perf_counter()
    model.learn(settings["steps"], reset_num_timesteps=False)
    return (model.num_timesteps - done) / (time.perf_counter() - start)


def ppo(settings: dict, policy: str, envs) -> PPO:
    if settings["normalize"]:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    batch_size, clip = settings["num_envs"] * settings["num_steps"], settings["clip_coef"]
    return PPO(
        policy, envs, n_steps=settings["num_steps"], n_epochs=settings["update_epochs"],
        batch_size=batch_size // settings["num_minibatches"], learning_rate=settings["learning_rate"],
        ent_coef=settings["ent_coef"], vf_coef=settings["vf_coef"], max_grad_norm=settings["max_grad_norm"],
        gae_lambda=settings["gae_lambda"], gamma=settings["gamma"], clip_range=clip, clip_range_vf=clip, device="cpu",
        seed=1,
    )  # fmt: skip


def off_policy(settings: dict, policy: str, envs) -> DQN | SAC | TD3 | DDPG:
    """An update for every `train_frequency` steps over all environments."""
    if settings["train_frequency"] % settings["num_envs"]:
        sys.exit("error: train_frequency has to be a multiple of num_envs here, which counts steps of each")
    common = {
        name: settings[name] for name in ("learning_rate", "buffer_size", "learning_starts", "batch_size", "gamma")
    }
    common |= {"train_freq": settings["train_frequency"] // settings["num_envs"], "gradient_steps": 1, "device": "cpu"}
    common |= {"seed": 1, "tau": settings["tau"]}
    if settings["algorithm"] == "dqn":
        network = {} if policy == "CnnPolicy" else {"policy_kwargs": {"net_arch": [120, 84]}}
        network |= {"target_update_interval": settings["target_network_frequency"]}
        return DQN(policy, envs, max_grad_norm=settings["max_grad_norm"], **network, **common)
    kind = {"sac": SAC, "td3": TD3, "ddpg": DDPG}[settings["algorithm"]]
    return kind(policy, envs, policy_kwargs={"net_arch": [256, 256]}, **common)


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
