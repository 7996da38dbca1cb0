"""Speed of the agents beside what a user would pick instead: same environment, same hyperparameters, in turns.

    python benchmarks/peers.py                    # every comparison, about 15 minutes on two cores
    python benchmarks/peers.py --only cartpole --repeats 5

A peer is installed into an environment of its own under the cache directory, from PyPI, beside our own torch. Each
measurement is a process of its own; ours and the peer's take turns, and what counts is the ratio of two neighbours, so
that a drift of the machine meets both. Both sides leave start-up and warm-up out: SPS is agent steps per second over
all environments. One JSON line a comparison is appended to the results.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==" + torch.__version__.split("+")[0]
SB3 = ["stable-baselines3==2.9.2", "gymnasium[atari]==1.4.0", "opencv-python-headless", TORCH]

# Runs in the peer's environment: builds PPO with our settings, learns one rollout to warm up, then times the rest.
SB3_PPO = """
import json, sys, time
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

settings = json.loads(sys.argv[1])
if settings["atari"]:
    import ale_py, gymnasium
    gymnasium.register_envs(ale_py)
    envs = VecFrameStack(make_atari_env(settings["env_id"], n_envs=settings["num_envs"], seed=1), 4)
else:
    envs = make_vec_env(settings["env_id"], n_envs=settings["num_envs"], seed=1)
clip = settings["clip_coef"]
model = PPO(
    "CnnPolicy" if settings["atari"] else "MlpPolicy", envs, n_steps=128, n_epochs=4, learning_rate=2.5e-4,
    batch_size=128 * settings["num_envs"] // 4, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, gae_lambda=0.95,
    gamma=0.99, clip_range=clip, clip_range_vf=clip, device="cpu", seed=1,
)
model.learn(128 * settings["num_envs"])
done, start = model.num_timesteps, time.perf_counter()
model.learn(settings["steps"], reset_num_timesteps=False)
print((model.num_timesteps - done) / (time.perf_counter() - start))
"""
RULES = "--num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --eval-episodes 0".split()
CARTPOLE = {"env_id": "CartPole-v1", "num_envs": 4, "clip_coef": 0.2}
BREAKOUT = {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 8, "clip_coef": 0.1}
COMPARISONS = {  # name: our agent, our flags, the peer's settings, the steps that our side takes and the peer's
    "cartpole": ("ppo", [*RULES, "--num-envs", "4"], CARTPOLE, 40_960, 20_480),
    "cartpole-defaults": ("ppo", ["--eval-episodes", "0"], CARTPOLE, 204_800, 20_480),
    "breakout": ("ppo_atari", [*RULES, "--env-id", "Breakout-v5", "--num-envs", "8"], BREAKOUT, 5_120, 4_096),
}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(COMPARISONS)
    """names of the comparisons to run"""
    modes: tuple[str, ...] = ("eager", "compile")
    """modes of ours to compare"""
    repeats: int = 5
    """times that ours and the peer's take turns"""
    results: Path = ROOT / "benchmarks/peers.jsonl"
    """file that every comparison is appended to"""
    cache: Path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "redline"
    """folder for the peers' environments"""


def peer_python(cache: Path) -> Path:
    """Python of an environment with the peer in it, made on the first call."""
    python = cache / "sb3" / "bin" / "python"
    if not python.exists():
        venv.create(cache / "sb3", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *SB3], check=True)
    return python


def our_sps(agent: str, flags: list[str], steps: int, mode: str) -> float:
    """SPS that a run of one of our agents reports; it leaves its own warm-up out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "agents" / f"{agent}.py", *flags, "--total-timesteps", steps, "--mode", mode]
        command += ["--device", "cpu", "--run-dir", f"{folder}/run"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])["sps"]


def peer_sps(python: Path, settings: dict, steps: int) -> float:
    """SPS of the peer, its warm-up left out."""
    settings = settings | {"steps": steps, "atari": "NoFrameskip" in settings["env_id"]}
    done = subprocess.run([python, "-c", SB3_PPO, json.dumps(settings)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    return float(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    python = peer_python(args.cache)
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(": ")[1] for line in cpuinfo.splitlines() if "model name" in line), platform.processor())
    machine = {"commit": commit.strip(), "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    machine |= {"python": platform.python_version(), "date": datetime.now(UTC).date().isoformat()}
    machine |= {"command": " ".join(["python benchmarks/peers.py", *sys.argv[1:]])}
    for name in args.only:
        agent, flags, settings, steps, peer_steps = COMPARISONS[name]
        sps, ratios = {"sb3": []} | {mode: [] for mode in args.modes}, {mode: [] for mode in args.modes}
        for turn in range(args.repeats):
            sps["sb3"].append(peer_sps(python, settings, peer_steps))
            for mode in args.modes:
                sps[mode].append(our_sps(agent, flags, steps, mode))
                ratios[mode].append(sps[mode][-1] / sps["sb3"][-1])
            print(f"{name} {turn + 1}/{args.repeats}", {k: round(v[-1]) for k, v in sps.items()}, flush=True)
        for mode, values in ratios.items():
            print(f"{name} {mode}: {statistics.median(values):.2f} x SB3 ({min(values):.2f} to {max(values):.2f})")
        row = {"comparison": name, "agent": agent, "flags": " ".join(flags), "peer": SB3[0], "peer_settings": settings}
        row |= {"sps": sps, "ratio_median": {m: statistics.median(v) for m, v in ratios.items()}, "ratios": ratios}
        with open(args.results, "a") as file:
            file.write(json.dumps(row | machine) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
