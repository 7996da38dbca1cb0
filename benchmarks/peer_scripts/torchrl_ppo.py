"""Steps per second of TorchRL's PPO, from the components that its documentation puts together for one process.

Runs in the peer's environment, started by benchmarks/peers.py with the settings in JSON; prints the SPS last.
"""

import json
import sys
import time

import torch
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import GymEnv, SerialEnv
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE


def main(settings: dict) -> float:
    if settings["torch_threads"]:
        torch.set_num_threads(settings["torch_threads"])
    torch.manual_seed(1)
    num_envs, batch_size = settings["num_envs"], settings["num_envs"] * settings["num_steps"]
    envs = SerialEnv(num_envs, lambda: GymEnv(settings["env_id"], categorical_action_encoding=True))
    sizes = {"in_features": envs.observation_spec["observation"].shape[-1], "num_cells": (64, 64)}
    logits = TensorDictModule(MLP(out_features=envs.action_spec.space.n, **sizes), ["observation"], ["logits"])
    actor = ProbabilisticActor(
        logits, in_keys=["logits"], spec=envs.action_spec, distribution_class=Categorical, return_log_prob=True
    )
    critic = ValueOperator(MLP(out_features=1, **sizes), in_keys=["observation"])
    advantage = GAE(gamma=settings["gamma"], lmbda=settings["gae_lambda"], value_network=critic)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=settings["clip_coef"], clip_value=settings["clip_coef"], normalize_advantage=True,
        entropy_coeff=settings["ent_coef"], critic_coeff=settings["vf_coef"], loss_critic_type="l2",
    )  # fmt: skip
    optimizer = torch.optim.Adam(loss.parameters(), settings["learning_rate"], eps=1e-5)
    minibatches = TensorDictReplayBuffer(
        storage=LazyTensorStorage(batch_size), sampler=SamplerWithoutReplacement(),
        batch_size=batch_size // settings["num_minibatches"],
    )  # fmt: skip
    collector = Collector(envs, actor, frames_per_batch=batch_size, total_frames=-1,
                          auto_register_policy_transforms=True)  # fmt: skip
    done = 0
    for iteration, rollout in enumerate(collector):
        if iteration:
            done += rollout.numel()
        with torch.no_grad():
            advantage(rollout)
        minibatches.extend(rollout.reshape(-1))
        for _ in range(settings["update_epochs"]):
            for minibatch in minibatches:
                losses = loss(minibatch)
                sum(losses[f"loss_{part}"] for part in ("objective", "critic", "entropy")).backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), settings["max_grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
        if iteration == 0:
            start = time.perf_counter()  # the first iteration warms up
        if done >= settings["steps"]:
            break
    sps = done / (time.perf_counter() - start)
    collector.shutdown()
    return sps


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
