"""PPO over several ranks: the same as one process on the joined batch, and none waits for ever for one that is gone."""

import datetime
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Result, agent_named, final_json, finish, flags, has_compiler, script, strict_json, tiny
from emulation import emulated_graphs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_recurrent import Recall

NAME = "ppo_atari_multigpu"
multi, atari = agent_named(NAME), agent_named("ppo_atari")
LONG = 10**7  # environment steps that no test waits for
QUICK = ["--num-minibatches", "1", "--num-steps", "8", "--checkpoint-minutes", "1e-6"]
ENDLESS = [*tiny(NAME, run_dir="run", eval_episodes=0), *QUICK, "--total-timesteps", str(LONG)]
RESTARTED = [*tiny(NAME, eval_episodes=0), *QUICK, "--total-timesteps", "256"]
slow = pytest.mark.slow


# ---- starting ranks --------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_process(folder: Path, output: Path, env: dict, function, arguments) -> None:
    """In a new process: call a function in a folder, with an environment, its output in files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(env)
    function(*arguments)


class Rank:
    """A process that is told to be a rank of several, forked from one that has imported everything."""

    def __init__(self, folder: Path, output: Path, env: dict, function, arguments):
        context, self.output = multiprocessing.get_context("forkserver"), output
        self.process = context.Process(target=as_process, args=(folder, output, env, function, arguments))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = 100):
        self.process.join(timeout)
        return [Path(f"{self.output}.{name}").read_text() for name in ("stdout", "stderr")]

    def finish(self, timeout: float = 100) -> Result:
        stdout, stderr = self.communicate(timeout)
        assert self.poll() is not None, f"it hangs: {stderr}"
        return Result(self.poll(), stdout, stderr)


@pytest.fixture
def start(tmp_path, tmp_path_factory, monkeypatch):
    """start(function, *arguments, ranks=[0, 1], size=2): ranks as torchrun starts them, without one that ends them."""
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # of the process that all are forked from
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    started = []

    def start(function, *arguments, ranks=(0, 1), size=2):
        output, port = tmp_path_factory.mktemp("output"), free_port()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        envs = [{name: str(x) for name, x in (env | {"RANK": n, "LOCAL_RANK": n}).items()} for n in ranks]
        new = [Rank(tmp_path, output / env["RANK"], env, function, arguments) for env in envs]
        started.extend(new)
        return new

    yield start
    for rank in started:
        rank.process.kill()
        rank.process.join()


def play(argv: list, minutes: float | None = None) -> None:
    """Run the agent as a user does. `minutes` stand for the five that a rank waits for another one."""
    limit = {"timeout": datetime.timedelta(minutes=minutes)} if minutes else {}
    for function in (dist.rendezvous, dist.init_process_group):
        setattr(dist, function.__name__, lambda *inputs, f=function, **options: f(*inputs, **options | limit))
    sys.argv = [str(script(NAME)), *map(str, argv)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def wait_for(condition, *processes, seconds=100):
    """Wait until a condition holds and return what it gave; none of the processes may end before."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        for process in processes:
            assert process.poll() is None, "\n".join(process.communicate())
        assert time.monotonic() < end, "it did not get so far"
        time.sleep(0.01)
    return value


def saved(run_dir: Path) -> dict:
    """The checkpoint of a run; {"global_step": 0} before there is one."""
    file = run_dir / "checkpoint.pt"
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {"global_step": 0}


def updates_of(run_dir: Path) -> set[int]:
    """How many steps the optimizer in a run's checkpoint has made."""
    return {int(state["step"]) for state in saved(run_dir)["optimizer"]["state"].values()}


# ---- the same as one process -----------------------------------------------------------------------------------------


class Updates:
    """An agent on random data, its steps bound to a mode; "emulated" is cudagraphs on a CPU."""

    def __init__(self, module, num_envs: int, mode: str = "eager"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        obs, actions = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8), gymnasium.spaces.Discrete(3)
        envs = SimpleNamespace(single_observation_space=obs, single_action_space=actions)
        self.module = module
        self.args = module.Args(num_envs=num_envs, num_steps=8, num_minibatches=2, update_epochs=2)
        self.agent = module.Agent(3).to(memory_format=torch.channels_last)
        # at larger rates, weights that differ by rounding are soon far apart
        self.optimizer = torch.optim.Adam(self.agent.parameters(), torch.tensor(1e-5), eps=1e-5, fused=True)
        self.rollout = module.Rollout(self.args, envs, torch.device("cpu"))
        mode = "cudagraphs" if mode == "emulated" else mode
        self.acts, self.learn = module.accelerate(mode, self.agent, self.optimizer, self.rollout, self.args)

    def play(self, number: int) -> None:
        """A rollout of random pictures, rewards and ends, which depend on `number` alone."""
        rng, rollout = np.random.default_rng(number), self.rollout
        self.module.draw_noise(rollout, torch.Generator().manual_seed(number))
        for step in [*self.acts, lambda: None]:
            rollout.host_obs.copy_(torch.tensor(rng.integers(256, size=rollout.host_obs.shape)))
            step()
        rewards, terminations, dones = rollout.host_outcomes
        rewards.copy_(torch.tensor(rng.normal(size=rewards.shape)))
        dones.copy_(torch.tensor(rng.random(dones.shape) < 0.3))
        terminations.copy_(dones * torch.tensor(rng.random(dones.shape) < 0.5))

    def gradients(self) -> tuple[list, dict]:
        """What every step of the optimizer in a learning phase gets, and the metrics; the weights stay as they are."""
        grads = []

        def step_optimizer(optimizer, params, new, max_grad_norm):
            assert all(grad.stride() == param.stride() for grad, param in zip(new, params)), "a fused Adam needs that"
            grads.append(torch.cat([grad.flatten() for grad in new]))
            return grads[-1].norm()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, "step_optimizer", step_optimizer)
            metrics = self.module.update(self.agent, None, self.rollout, self.args)
        return grads, metrics

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.agent.parameters()])


def recordable_all_reduce() -> None:
    """Make dist.all_reduce one operation that waits for its result, so that an emulated graph can hold it."""
    all_reduce = dist.all_reduce

    @torch.library.custom_op("redline::all_reduce", mutates_args=("x",))
    def recordable(x: torch.Tensor) -> None:
        all_reduce(x)

    dist.all_reduce = recordable


def record_updates(mode: str) -> None:
    """In a rank: gradients and metrics of a learning phase, the data of it, and the weights after four of them."""
    dist.init_process_group()
    if mode == "emulated":
        recordable_all_reduce()
    rank, size = dist.get_rank(), dist.get_world_size()
    with emulated_graphs() if mode == "emulated" else nullcontext():
        it = Updates(multi, 4, mode)
        start = it.weights()
        for number in range(4):  # two as they are, one recorded, one replayed
            it.play(size * number + rank)
            it.learn()
    result = {"start": start, "weights": it.weights()}
    if mode == "eager":
        it = Updates(multi, 4)
        it.play(1000 + rank)
        with torch.no_grad():
            it.agent.actor.weight.mul_(50)  # other probabilities than those that the actions were drawn with
        grads, metrics = it.gradients()
        tensors = {name: x for name, x in vars(it.rollout).items() if isinstance(x, torch.Tensor)}
        result |= {"grads": grads, "metrics": metrics, "rollout": tensors}
    torch.save(result, f"{mode}{rank}.pt")
    dist.destroy_process_group()


def updates(start, folder, mode) -> list[dict]:
    """What record_updates gave on each rank."""
    for rank in start(record_updates, mode):
        result = rank.finish(300)
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{mode}{rank}.pt") for rank in (0, 1)]


def test_two_ranks_learn_as_one_process_on_the_joined_batch(start, tmp_path):
    """Every gradient and metric is that of ppo_atari.py on both ranks' rows, and graphs with the sums inside do it."""
    ranks, one = updates(start, tmp_path, "eager"), Updates(atari, 8)
    assert torch.equal(ranks[0]["start"], ranks[1]["start"]) and torch.equal(ranks[0]["start"], one.weights())
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"]), "to the bit, after 16 steps of the optimizer"
    assert not torch.equal(ranks[0]["weights"], ranks[0]["start"])

    rollouts = [rank["rollout"] for rank in ranks]
    assert not torch.equal(*(rollout["obs"] for rollout in rollouts))
    for name, dim in {"obs": 1, "actions": 1, "logprobs": 1, "values": 1, "host_obs": 0, "host_outcomes": 2}.items():
        getattr(one.rollout, name).copy_(torch.cat([rollout[name] for rollout in rollouts], dim))
    for own, joined in zip(zip(*(rollout["permutations"] for rollout in rollouts)), one.rollout.permutations):
        # row t x 4 + n of rank r is row t x 8 + 4 r + n of the joined batch
        parts = [(row // 4 * 8 + 4 * rank + row % 4).view(2, -1) for rank, row in enumerate(own)]
        joined.copy_(torch.cat(parts, dim=1).flatten())
    with torch.no_grad():
        one.agent.actor.weight.mul_(50)
    grads, metrics = one.gradients()
    dones = [rollout["host_outcomes"][2, :-1].sum() for rollout in rollouts]
    assert dones[0] != dones[1], "a rank with more rows that count has more weight"
    assert len(grads) == 4 and metrics["clipfrac"] > 0.1
    for rank in ranks:
        torch.testing.assert_close(rank["metrics"], metrics, rtol=1e-4, atol=1e-5)
        for ours, expected in zip(rank["grads"], grads, strict=True):
            assert (ours - expected).norm() < 1e-4 * expected.norm()

    captured = updates(start, tmp_path, "emulated")
    assert all(torch.equal(rank["weights"], ranks[0]["weights"]) for rank in captured)


@slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_ranks_agree_with_eager_ones(start, tmp_path):
    eager, compiled = (updates(start, tmp_path, mode) for mode in ("eager", "compile"))
    assert torch.equal(compiled[0]["weights"], compiled[1]["weights"])
    begin, one, other = eager[0]["start"], eager[0]["weights"], compiled[0]["weights"]
    assert (one - other).norm() < 1e-2 * (one - begin).norm()


class Sides(Recall):
    """Games whose stack of pictures shows the side that the action has to name, for 1; the other is -1."""

    delay = 1


class Pixels(torch.nn.Module):
    """Every twelfth pixel of pictures [batch, 4, 84, 84], in a row."""

    def forward(self, pictures):
        return pictures[..., 6::12, 6::12].flatten(1)


def play_sides(module_name: str, seed: int, num_envs: int = 16) -> None:
    """Train on Sides with a cheap network as `main` does; leaves its seeds, noise, weights and summary."""
    module, rank = agent_named(module_name), int(os.environ.get("RANK", 0))
    made, noise, agents, draw_noise = [], [], [], module.draw_noise

    class Sparse(module.Agent):
        """The agent, but for one layer over every twelfth pixel in place of its convolutions; on rank 1 other ones."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            linear = module.layer_init(torch.nn.Linear(49 * 4, 512))
            torch.nn.init.constant_(linear.bias, rank)
            self.network = torch.nn.Sequential(Pixels(), linear, torch.nn.ReLU())
            agents.append(self)

    def make_envs(args, num_envs, seed):
        made.append((num_envs, seed))
        return Sides(num_envs, seed, 4)

    def draw(rollout, generator):
        draw_noise(rollout, generator)
        noise.append(rollout.gumbel.clone())

    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"make_envs": make_envs, "Agent": Sparse, "draw_noise": draw}.items():
            patch.setattr(module, name, function)
        sizes = {"num_envs": num_envs, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 14 * 16 * 16}
        machine = {"device": "cpu", "precision": "fp32", "torch_threads": 1, "mode": "eager"}
        args = module.Args(seed, **sizes, **machine, learning_rate=1e-3, run_dir=f"{module_name}{seed}")
        summary = json.loads(json.dumps(module.main(args)))  # torch's version is no plain text
    result = {"made": made[0], "noise": noise, "summary": summary, "weights": agents[0].state_dict()}
    torch.save(result, f"{module_name}{seed}-{rank}.pt")


def curve(run_dir) -> np.ndarray:
    """The mean return of the games that ended in each iteration."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return np.array([point.value for point in events.Scalars("charts/episodic_return")])


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_ranks_learn_as_fast_as_one_process(seed, start, tmp_path, monkeypatch):
    """As many environments in all, as many steps: the curve is no worse, and the summary counts both ranks' steps."""
    monkeypatch.chdir(tmp_path)
    ranks = start(play_sides, NAME, seed)
    play_sides("ppo_atari", seed)
    for rank in ranks:
        result = rank.finish()
        assert result.returncode == 0, result.stderr
    ours, theirs = curve(f"{NAME}{seed}"), curve(f"ppo_atari{seed}")
    assert theirs[-5:].mean() > 0.9, "the task can be learnt"
    assert ours[-5:].mean() > 0.9 and ours.mean() > theirs.mean() - 0.15

    names = f"{NAME}{seed}-0", f"{NAME}{seed}-1", f"ppo_atari{seed}-0"
    first, second, one = (torch.load(f"{name}.pt") for name in names)
    assert first["made"] == (8, one["made"][1]) and second["made"] == (8, one["made"][1] + 8), "seeds of their own"
    assert not any(torch.equal(x, y) for x in first["noise"] for y in second["noise"])
    assert all(torch.equal(x, second["weights"][name]) for name, x in first["weights"].items()), "rank 0's all along"
    assert second["summary"] == {}
    summary = strict_json((tmp_path / f"{NAME}{seed}/summary.json").read_text())
    assert summary == first["summary"] and summary["ranks"] == 2 and summary["num_envs"] == 16
    assert summary["global_step"] == one["summary"]["global_step"] == 14 * 16 * 16
    assert summary["train_return_mean"] > 0.9 and summary["eval_return_mean"] > 0.9
    config = json.loads((tmp_path / f"{NAME}{seed}/config.json").read_text())
    assert config["args"]["num_envs"] == 16, "the total"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"num_envs": 3}, {"num_envs": 2, "num_steps": 3, "num_minibatches": 2}, {"env_id": "Pendulum-v1"}],
    ids=["num_envs", "num_minibatches", "env_id"],
)
def test_a_refusal_ends_every_rank(changes, start, tmp_path):
    """With one sentence on each, which names the flag, and nothing written."""
    for rank in start(play, tiny(NAME, run_dir="run", **changes)):
        result, flag = rank.finish(), [*changes][-1].replace("_", "-")
        assert result.returncode == 2 and result.stdout == "", result
        assert len(result.messages) == 1 and result.messages[0].startswith("error: --"), result.messages
        assert f"--{flag}" in result.messages[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env", [{}, {"RANK": "0"}, {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}], ids=len)
def test_ranks_without_torchrun_are_told_what_is_missing(env, cli, monkeypatch, tmp_path):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2"} | env).items():
        monkeypatch.setenv(name, value)
    result = cli(NAME, *tiny(NAME))
    assert result.returncode == 2 and len(result.messages) == 1, result
    assert result.messages[0].startswith("error: the ranks cannot meet") and "torchrun" in result.messages[0]
    assert not list(tmp_path.iterdir())


def test_every_rank_has_a_gpu_of_its_own(monkeypatch):
    class Chosen(Exception):
        """Ends `main` once it has chosen its device."""

    def set_device(device):
        raise Chosen(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(Chosen, match="cuda:3"):
        multi.main(multi.Args())
    for ranks, device in [("4", "cuda:0"), ("5", "auto")]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(multi.UserError, match=f"--device {device}.* GPU of its own"):
            multi.main(multi.Args(device=device))


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_stops_all_in_order(start, cli, tmp_path):
    """All stop after the same iteration, rank 0 leaves checkpoint and summary, and one rank alone can go on."""
    ranks, run_dir = start(play, ENDLESS), tmp_path / "run"
    wait_for(lambda: saved(run_dir)["global_step"] >= 32, *ranks)
    ranks[1].send(signal.SIGTERM)
    results = [rank.finish() for rank in ranks]
    assert [result.returncode for result in results] == [128 + signal.SIGTERM] * 2, results
    assert results[0].messages == [] and results[1].stderr == results[1].stdout == ""
    summary = strict_json(results[0].stdout)
    assert summary["stopped_by"] == "SIGTERM" and summary["ranks"] == 2 and summary["eval_episodes"] == 0
    assert 32 <= summary["global_step"] == saved(run_dir)["global_step"] < LONG
    total = summary["global_step"] + 33
    resumed = final_json(cli(NAME, "--resume", run_dir, "--total-timesteps", total))
    assert resumed["ranks"] == 1 and resumed["global_step"] == total - 1
    assert updates_of(run_dir) == {resumed["global_step"] // 16}, "the optimizer goes on as well"


def play_by_rank(argv: list) -> None:
    """Train with another learning rate on every rank, and leave the weights."""
    module, rank, agents = agent_named(NAME), int(os.environ["RANK"]), []

    class Watched(module.Agent):
        def __init__(self, *inputs, **options):
            super().__init__(*inputs, **options)
            agents.append(self)

    module.Agent = Watched
    module.main(module.parse_args([*map(str, argv), "--learning-rate", str(0.01 * (1 + rank))]))
    torch.save(agents[0].state_dict(), f"weights{rank}.pt")


@slow
def test_the_flags_of_the_first_rank_hold_for_all(start, tmp_path):
    """Ranks that train by settings of their own would drift apart without a word; here, by another learning rate."""
    for rank in start(play_by_rank, [*tiny(NAME, run_dir="run", eval_episodes=0), *QUICK, "--total-timesteps", 64]):
        result = rank.finish()
        assert result.returncode == 0, result.stderr
    weights = [torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert json.loads((tmp_path / "run/config.json").read_text())["args"]["learning_rate"] == 0.01


@slow
def test_two_ranks_go_on_with_a_run_of_one(start, cli, tmp_path):
    """And only rank 0 reads its checkpoint."""
    first = final_json(cli(NAME, *tiny(NAME, run_dir="run", eval_episodes=0), *QUICK, "--total-timesteps", 64))
    assert first["ranks"] == 1 and first["global_step"] == 64
    ranks = start(play, ["--resume", "run", "--total-timesteps", 128])
    results = [rank.finish() for rank in ranks]
    summary = final_json(results[0])
    assert summary["ranks"] == 2 and summary["global_step"] == 128
    assert results[1].returncode == 0 and results[1].stdout == results[1].stderr == ""
    assert updates_of(tmp_path / "run") == {8}


@slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_ends_by_itself_when_another_is_gone(number, rank, start, tmp_path):
    """Without torchrun as well: killed, the other closes its connections; fallen silent, it meets the time limit."""
    ranks = start(play, ENDLESS, 0.05)
    wait_for(lambda: saved(tmp_path / "run")["global_step"] >= 32, *ranks)
    ranks[rank].send(number)
    result = ranks[1 - rank].finish()
    assert result.returncode == 1 and len(result.messages) == 1, result
    assert result.messages[0].startswith("error: ") and "gloo" in result.messages[0]
    assert saved(tmp_path / "run")["global_step"] >= 32


@slow
def test_a_rank_does_not_wait_for_ever_for_one_that_never_starts(start, tmp_path):
    result = start(play, ENDLESS, 0.05, ranks=[0])[0].finish()
    assert result.returncode == 2 and len(result.messages) == 1, result
    assert result.messages[0].startswith("error: the ranks cannot meet") and not list(tmp_path.iterdir())


@pytest.fixture
def launch(tmp_path):
    """launch(*command, **env): start a command in tmp_path; whatever of it is left at the end of the test is ended."""
    started = []

    def launch(*command, **env):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | env}
        started.append(subprocess.Popen([*map(str, command)], cwd=tmp_path, **options))
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun then ends the ranks, which a SIGKILL of it would leave behind
            process.communicate(timeout=60)


def torchrun(*options, program=None) -> list:
    """The command of torchrun with the agent."""
    return [sys.executable, "-m", "torch.distributed.run", *options, program or script(NAME)]


def pid_of_rank(parent: int, rank: int) -> int:
    """The process with this rank among the children of torchrun."""
    for child in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return child
    raise AssertionError("torchrun has no such rank")


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_torchrun_starts_killed_ranks_again_and_the_run_goes_on(rank, launch, tmp_path):
    """In the same folder, whose name is by chance, from the last checkpoint."""
    process = launch(*torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1"), *RESTARTED)
    [run_dir] = wait_for(lambda: [*tmp_path.glob("runs/*")], process)
    wait_for(lambda: saved(run_dir)["global_step"], process)
    ranks = [pid_of_rank(process.pid, n) for n in (0, 1)]
    os.kill(ranks[rank], signal.SIGKILL)
    wait_for(lambda: not any(map(alive, ranks)), process)
    kept, result = saved(run_dir)["global_step"], finish(process, timeout=120)
    summary = final_json(result)
    assert [*tmp_path.glob("runs/*")] == [run_dir] and summary["run_dir"] == str(run_dir.relative_to(tmp_path))
    assert summary["global_step"] == saved(run_dir)["global_step"] == 256 and summary["ranks"] == 2
    assert updates_of(run_dir) == {16}, "an update for every 16 steps, none lost and none twice"
    events = EventAccumulator(str(max(run_dir.glob("events*"), key=lambda path: path.stat().st_mtime)))
    events.Reload()
    steps = [point.step for point in events.Scalars("charts/SPS")]
    assert 0 < kept < 256 and steps == list(range(kept + 16, 257, 16)), "it goes on where the checkpoint was"


# ---- several machines ------------------------------------------------------------------------------------------------


@pytest.fixture
def machines():
    """Two network namespaces that a cable joins: [(name, interface, address), ...]."""
    names = [f"redline{os.getpid()}{side}" for side in "ab"]
    ends = [f"v{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        try:
            return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
        except OSError as error:
            pytest.skip(f"needs iproute2: {error}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
    for number, (name, end) in enumerate(zip(names, ends), start=1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield [(name, end, f"10.77.0.{number}") for number, (name, end) in enumerate(zip(names, ends), start=1)]
    for name in names:
        ip("netns", "del", name)


@slow
def test_two_machines_meet_lose_the_cable_and_go_on(machines, launch, tmp_path):
    """A run over two machines that only a cable joins; cut, both ranks stop; mended, the run goes on.

    The second machine does not see the run folder.
    """
    (tmp_path / "elsewhere").mkdir()
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
                       f"import {__name__} as tests\ntests.play(sys.argv[1:], minutes=0.5)\n")  # fmt: skip
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", "--master-port=29400"]
    argv, processes, run_dir = [*tiny(NAME, run_dir="run"), *QUICK, "--total-timesteps", 1600], [], tmp_path / "run"
    for rank, (name, interface, _) in enumerate(machines):
        command = torchrun(*options, f"--node-rank={rank}", f"--master-addr={machines[0][2]}", program=program)
        command = ["ip", "netns", "exec", name, "env", "-C", "elsewhere" if rank else ".", *command]
        processes.append(launch(*command, *argv, GLOO_SOCKET_IFNAME=interface))
    wait_for(lambda: saved(run_dir)["global_step"] >= 32, *processes)
    pids = [pid_of_rank(process.pid, rank) for rank, process in enumerate(processes)]
    cable = ["ip", "-n", machines[1][0], "link", "set", machines[1][1]]
    subprocess.run([*cable, "down"], check=True)
    wait_for(lambda: not any(map(alive, pids)), *processes)
    reached = saved(run_dir)["global_step"]
    subprocess.run([*cable, "up"], check=True)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    summary = final_json(results[0])
    assert summary["ranks"] == 2 and summary["global_step"] == 1600 == saved(run_dir)["global_step"] > reached
    assert len(list(run_dir.glob("events*"))) >= 2, "it was started again"
    assert results[1].stdout == "" and not list((tmp_path / "elsewhere").iterdir())


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "cudagraphs", "compile-cudagraphs"])
def test_trains_with_nccl(mode, launch):
    """A rank on every GPU of this machine, one at least: NCCL's all_reduce runs, and is captured where graphs are."""
    ranks = torch.cuda.device_count()
    sizes = flags(device="cuda", mode=mode, num_envs=2 * ranks, total_timesteps=10 * 32 * ranks)
    process = launch(*torchrun("--standalone", f"--nproc-per-node={ranks}"), *tiny(NAME), *sizes)
    summary = final_json(finish(process))
    assert summary["ranks"] == ranks and summary["global_step"] == 10 * 32 * ranks and summary["mode"] == mode
