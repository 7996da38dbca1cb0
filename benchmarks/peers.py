"""Speed of the agents beside what a user would pick instead: same environment, same hyperparameters, in turns.

    python benchmarks/peers.py                    # every comparison, about 30 minutes on two cores
    python benchmarks/peers.py --only cartpole --peers sb3 torchrl --repeats 5

A peer is installed into an environment of its own under the cache directory, from PyPI, beside our own torch. Each
measurement is a process of its own; the peers and our modes take turns, and what counts is the ratio of two in the same
turn, so that a drift of the machine meets both. All sides leave start-up and warm-up out: SPS is agent steps per second
over all environments. One JSON line a comparison and peer is appended to the results; a peer that does not install or
does not run has the reason in it instead of ratios. benchmarks/report.py makes the table.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import fps
import torch
import tyro
from results import fail

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==" + torch.__version__.split("+")[0]


@dataclass
class Peer:
    script: str
    """file in benchmarks/peer_scripts that takes a comparison's settings in JSON and prints the SPS as its last line"""
    requirements: list[str]
    """what its environment holds; the first names the peer in the results"""
    comparisons: tuple[str, ...]
    """names of the comparisons that it takes part in"""


PEERS = {
    "sb3": Peer(
        "sb3.py", ["stable-baselines3==2.9.2", "gymnasium[atari,mujoco]==1.4.0", "opencv-python-headless", TORCH],
        ("cartpole", "cartpole-defaults", "breakout", "halfcheetah",
         "dqn", "dqn-defaults", "dqn-breakout", "sac", "sac-bf16", "td3", "td3-bf16", "ddpg"),
    ),
    "torchrl": Peer("torchrl_ppo.py", ["torchrl==0.14.1", "gymnasium==1.4.0", TORCH], ("cartpole",)),
    # Sample Factory brings a gymnasium before 1.0 itself; CartPole-v1 is the same there
    "sample-factory": Peer("sample_factory_ppo.py", ["sample-factory==2.1.1", TORCH], ("cartpole",)),
}  # fmt: skip
CLASSIC = {"num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
MUJOCO = {"num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4, "ent_coef": 0.0}
SHARED = {"algorithm": "ppo", "gamma": 0.99, "gae_lambda": 0.95, "vf_coef": 0.5, "max_grad_norm": 0.5}  # our defaults
SHARED |= {"normalize": False}
# torch_threads as in ours: one for networks this small, which with more lose time to handing out work; 0 is torch's own
CARTPOLE = SHARED | CLASSIC | {"env_id": "CartPole-v1", "num_envs": 4, "clip_coef": 0.2, "torch_threads": 1}
BREAKOUT = SHARED | CLASSIC | {"env_id": "BreakoutNoFrameskip-v4", "num_envs": 8, "clip_coef": 0.1, "torch_threads": 0}
CHEETAH = SHARED | MUJOCO | {"env_id": "HalfCheetah-v4", "num_envs": 1, "clip_coef": 0.2, "torch_threads": 1}
CHEETAH |= {"normalize": True}
# one environment, as these are used; ours take as many updates for their environment steps, however many they have
REPLAY = {"num_envs": 1, "gamma": 0.99, "learning_starts": 1_000, "torch_threads": 0}
DQN = REPLAY | {"algorithm": "dqn", "env_id": "CartPole-v1", "learning_rate": 2.5e-4, "buffer_size": 10_000, "tau": 1.0}
DQN |= {"batch_size": 128, "train_frequency": 10, "target_network_frequency": 500, "torch_threads": 1}
DQN |= {"max_grad_norm": 1e9}  # no limit
DQN_BREAKOUT = DQN | {"env_id": "BreakoutNoFrameskip-v4", "learning_rate": 1e-4, "batch_size": 32, "train_frequency": 4}
DQN_BREAKOUT |= {"buffer_size": 20_000, "target_network_frequency": 1_000, "torch_threads": 0}
SAC = REPLAY | {"algorithm": "sac", "env_id": "HalfCheetah-v4", "learning_rate": 3e-4, "buffer_size": 100_000}
SAC |= {"batch_size": 256, "train_frequency": 1, "tau": 0.005}
TD3, DDPG = SAC | {"algorithm": "td3"}, SAC | {"algorithm": "ddpg"}
STARTS, PIXELS = {"learning_starts": 1_000}, {"env_id": "Breakout-v5", "precision": "bf16"}  # as Atari runs by default


def flags(rules: dict, **others) -> list[str]:
    """Flags of ours that say the same as a peer's settings."""
    rules = rules | others | {"eval_episodes": 0}
    return [word for name, value in rules.items() for word in (f"--{name.replace('_', '-')}", str(value))]


COMPARISONS = {  # name: our agent, our flags, the peers' settings, the steps that our side takes and the peers'
    "cartpole": ("ppo", flags(CLASSIC, num_envs=4), CARTPOLE, 40_960, 20_480),
    "cartpole-defaults": ("ppo", flags({}), CARTPOLE, 204_800, 20_480),
    "breakout": ("ppo_atari", flags(CLASSIC | PIXELS, num_envs=8), BREAKOUT, 7_168, 4_096),
    "halfcheetah": (
        "ppo_continuous_action", flags(MUJOCO, env_id="HalfCheetah-v4", num_envs=1), CHEETAH, 20_480, 12_288,
    ),
    "dqn": ("dqn", flags(STARTS, num_envs=1), DQN, 20_000, 20_000),
    "dqn-defaults": ("dqn", flags(STARTS), DQN, 60_000, 20_000),
    "dqn-breakout": ("dqn_atari", flags(STARTS | PIXELS, buffer_size=20_000), DQN_BREAKOUT, 4_000, 2_000),
    "sac": ("sac_continuous_action", flags(STARTS, precision="fp32"), SAC, 3_000, 1_000),
    "sac-bf16": ("sac_continuous_action", flags(STARTS, precision="bf16"), SAC, 3_000, 1_000),
    "td3": ("td3_continuous_action", flags(STARTS, precision="fp32"), TD3, 3_000, 1_000),
    "td3-bf16": ("td3_continuous_action", flags(STARTS, precision="bf16"), TD3, 3_000, 1_000),
    "ddpg": ("ddpg_continuous_action", flags(STARTS, precision="fp32", policy_frequency=1), DDPG, 3_000, 1_000),
}  # fmt: skip


@dataclass
class Args:
    only: tuple[str, ...] = tuple(COMPARISONS)
    """names of the comparisons to run"""
    peers: tuple[str, ...] = tuple(PEERS)
    """names of the peers to compare with"""
    modes: tuple[str, ...] = ("eager", "compile")
    """modes of ours to compare"""
    repeats: int = 5
    """times that ours and the peers take turns"""
    minutes: float = 10.0
    """longest that one measurement may take"""
    results: Path = ROOT / "benchmarks/peers.jsonl"
    """file that every comparison is appended to"""
    cache: Path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "redline"
    """folder for the peers' environments"""


# ---- measuring -------------------------------------------------------------------------------------------------------


def run(command: list, minutes: float, folder: str | None = None) -> str:
    """What a command prints; RuntimeError with a sentence if it fails or takes longer."""
    child = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True, cwd=folder,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=60 * minutes)
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
        child.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"did not end within {minutes:g} minutes") from None
        raise
    if child.returncode:
        raise RuntimeError(reason(err))
    return out


def reason(err: str) -> str:
    """The sentence on stderr that says best why a process failed: the last one that names an error, else the last."""
    said = [line.strip() for line in err.splitlines() if line.strip()] or ["no message"]
    named = [line for line in said if line.split(": ")[0].endswith(("Error", "error", "ERROR")) and ": " in line]
    useful = [
        line for line in named if "subprocess-exited-with-error" not in line
    ]  # pip's, of what it has quoted above
    return (useful or said)[-1].removeprefix("error: ").removeprefix("ERROR: ")[:200]


def install(name: str, cache: Path) -> Path:
    """Python of an environment with exactly this peer's requirements in it, made on the first call."""
    folder, requirements = cache.absolute() / name, "\n".join(PEERS[name].requirements)
    python, installed = folder / "bin/python", folder / "requirements.txt"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if not installed.exists() or installed.read_text() != requirements:
        try:
            run([python, "-m", "pip", "install", "--quiet", *PEERS[name].requirements], minutes=30)
        except RuntimeError as error:
            raise RuntimeError(f"does not install: {error}") from None
        installed.write_text(requirements)
    return python


def our_sps(agent: Path, flags: list[str], steps: int, mode: str, minutes: float) -> float:
    """SPS that a run of one of our agents reports; it leaves its own warm-up out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, agent, *flags, "--total-timesteps", steps, "--mode", mode]
        command += ["--device", "cpu", "--run-dir", f"{folder}/run"]
        return json.loads(run(command, minutes).splitlines()[-1])["sps"]


def peer_sps(python: Path, script: Path, settings: dict, minutes: float) -> float:
    """SPS of a peer, its warm-up left out."""
    with tempfile.TemporaryDirectory() as folder:  # MuJoCo leaves a log where it runs
        said = run([python, script, json.dumps(settings)], minutes, folder).split() or ["nothing"]
    try:
        return float(said[-1])
    except ValueError:
        raise RuntimeError(f"prints {said[-1]!r} where the SPS should be") from None


def compare(name: str, args: Args, pythons: dict[str, Path], failed: dict[str, str]) -> list[dict]:
    """The rows of one comparison, one for every peer; `failed` says which did not install."""
    agent, our_flags, settings, steps, peer_steps = COMPARISONS[name]
    peers = [peer for peer in args.peers if name in PEERS[peer].comparisons]
    script, settings, failed = ROOT / "agents" / f"{agent}.py", settings | {"steps": peer_steps}, dict(failed)
    if not script.exists():
        failed |= dict.fromkeys(peers, f"there is no agents/{agent}.py")
    sps = {side: [] for side in (*peers, *args.modes)}
    for turn in range(args.repeats):
        for peer in peers:
            if peer not in failed:
                try:
                    peer_script = ROOT / "benchmarks/peer_scripts" / PEERS[peer].script
                    sps[peer].append(peer_sps(pythons[peer], peer_script, settings, args.minutes))
                except RuntimeError as error:
                    failed[peer] = f"does not run: {error}"
        if failed.keys() >= set(peers):
            break
        try:
            for mode in args.modes:
                sps[mode].append(our_sps(script, our_flags, steps, mode, args.minutes))
        except RuntimeError as error:
            failed |= dict.fromkeys(peers, f"ours does not run in the mode {mode}: {error}")
            break
        latest = {side: round(values[-1]) for side, values in sps.items() if side not in failed}
        print(f"{name} {turn + 1}/{args.repeats}", latest, flush=True)
    rows = []
    for peer in peers:
        row = {"comparison": name, "agent": agent, "flags": " ".join(our_flags), "peer_name": peer}
        row |= {"peer": PEERS[peer].requirements[0], "peer_settings": settings}
        if peer in failed:
            rows.append(row | {"failed": failed[peer]})
            continue
        ratios = {mode: [a / b for a, b in zip(sps[mode], sps[peer])] for mode in args.modes}
        row |= {"sps": {side: sps[side] for side in (peer, *args.modes)}}
        rows.append(row | {"ratio_median": {m: statistics.median(v) for m, v in ratios.items()}, "ratios": ratios})
    return rows


# ---- main ------------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """What measured: commit, processor, versions, date and command."""
    commit = fps.git("describe", "--always", "--dirty") or os.environ.get("REDLINE_COMMIT", "")
    facts = {"commit": commit} | fps.describe_cpu() | {"torch": torch.__version__}
    facts |= {"python": platform.python_version(), "date": datetime.now(UTC).date().isoformat()}
    return facts | {"command": " ".join(["python benchmarks/peers.py", *sys.argv[1:]])}


def main(args: Args) -> None:
    for flag, names, known in (("--only", args.only, COMPARISONS), ("--peers", args.peers, PEERS)):
        if unknown := set(names) - known.keys():
            fail(f"{flag} {' '.join(sorted(unknown))}: must be among {', '.join(known)}")
    facts, pythons, failed = machine(), {}, {}
    for peer in args.peers:
        if set(args.only) & set(PEERS[peer].comparisons):
            try:
                pythons[peer] = install(peer, args.cache)
            except RuntimeError as error:
                failed[peer] = str(error)
    for name in args.only:
        rows = compare(name, args, pythons, failed)
        for row in rows:
            for mode, values in row.get("ratios", {}).items():
                print(f"{name} {mode}: {statistics.median(values):.2f} x {row['peer_name']} "
                      f"({min(values):.2f} to {max(values):.2f})")  # fmt: skip
            if "failed" in row:
                print(f"{name}: {row['peer_name']} failed: {row['failed']}")
        with open(args.results, "a") as file:
            file.writelines(json.dumps(row | facts) + "\n" for row in rows)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends what it has started too
    main(tyro.cli(Args, description=__doc__))
