"""What the tests of the run share: tiny runs, ways to stop them, and comparisons of how they ended."""

import csv
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import dql
from d4rl_tasks import TASKS, BadInput
from dql import Args
from housekeeping.ending import Stopped
from housekeeping.folder import seed_folders

torch.set_num_threads(1)  # the networks are small: threads would wait for each other, most of all on a busy machine
pytest.importorskip("h5py")
ROOT = Path(__file__).resolve().parents[1]
TIMES = ("updates_per_second", "seconds")


def random_file(path: Path, env_id="hopper-medium-v2", rows=600, **changes) -> Path:
    """Writes a file in D4RL's layout, with the task's dimensions and random contents."""
    import h5py

    rng, task = np.random.default_rng(0), TASKS[env_id]
    columns = {
        "observations": rng.standard_normal((rows, task.state_dim)).astype(np.float32),
        "actions": np.tanh(rng.standard_normal((rows, task.action_dim))).astype(np.float32),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "terminals": rng.uniform(size=rows) < 0.05,
        "timeouts": np.zeros(rows, bool),
    }
    with h5py.File(path, "w") as file:
        for name, values in (columns | changes).items():
            file[name] = values
    return path


def tiny_args(folder: Path, **changes) -> Args:
    """A run of a second: random data, and Hopper, which soon falls."""
    data = folder / "hopper.hdf5"
    return Args(**{
        "env_id": "hopper-medium-v2", "dataset_path": data if data.exists() else random_file(data), "device": "cpu",
        "runs_dir": folder / "runs", "num_updates": 30, "batch_size": 16, "num_steps": 2, "eval_every": 12,
        "eval_episodes": 3, "eval_candidates": 4, "log_every": 5, **changes,
    })  # fmt: skip


def resume(folder: Path, **changes) -> dict:
    return dql.train(Args(resume=folder, device="cpu", **changes))


def flags(args: Args) -> list[str]:
    """The command line of such a run."""
    words = []
    for name, value in vars(args).items():
        if value is not None and value != getattr(Args(), name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def command(*words: object, env: dict | None = None, python: tuple = (), **options) -> subprocess.CompletedProcess:
    """Runs python dql.py as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, *python, str(ROOT / "dql.py"), *map(str, words)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **options,
    )  # fmt: skip


def told(stderr: str) -> list[str]:
    """The lines of stderr without those of progress."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("update ")]


def one_line(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> str:
    """The one line on stderr of a process that ended with this exit code; it has the words."""
    lines = told(done.stderr)
    assert done.returncode == code and len(lines) == 1, (done.returncode, done.stderr[-3000:])
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


def bad_input(call: Callable, *words: str) -> str:
    """call() must raise BadInput with a one-line message that has all these words; returns the message."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    assert all(word in message for word in words), message
    return message


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv without times."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def read_torch(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a: object, b: object) -> None:
    """Two nested states have the same structure and the same bits."""
    flat = (torch.utils._pytree.tree_flatten_with_path(state)[0] for state in (a, b))
    a, b = ({str(path): leaf for path, leaf in leaves} for leaves in flat)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        assert torch.equal(leaf, b[name]) if torch.is_tensor(leaf) else leaf == b[name], name


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs have the same weights, optimizers, averages, generators, metrics and scores, bit for bit; not times."""
    states = [read_torch(folder) for folder in (a, b)]
    for part in ("agents", "generators"):
        assert_same(states[0][part], states[1][part])
    args = dql.read_args(a)
    for x, y in zip(seed_folders(args, a), seed_folders(args, b), strict=True):
        assert metrics(x) == metrics(y)
        assert_same(read_torch(x)["agents"], read_torch(y)["agents"])
        scores = [json.loads((folder / "summary.json").read_text()) for folder in (x, y)]
        for name in ("last", "best", "offline"):
            assert scores[0][name] == scores[1][name]


def on_call(count: int, function: Callable, do: Callable) -> Callable:
    """Wraps function so that its count-th call first calls do()."""
    calls = itertools.count(1)

    def called(*args):
        if next(calls) == count:
            do()
        return function(*args)

    return called


def stop_at(args: Args, count: int, where: object = dql.DiffusionQL, name="train_step", signum=signal.SIGTERM) -> Path:
    """The folder of a run that got a signal at the count-th call of where.name."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(where, name, on_call(count, getattr(where, name), lambda: signal.raise_signal(signum)))
        dql.train(args)
    assert stop.value.signum == signum
    return Path(str(stop.value).split("--resume ")[1])


@pytest.fixture(scope="session")
def run_left_alone(tmp_path_factory):
    """A function from a number of seeds to the arguments and folder of an uninterrupted run of 24 updates."""

    @functools.cache
    def run(num_seeds: int) -> tuple[Args, Path]:
        args = tiny_args(tmp_path_factory.mktemp("whole"), num_updates=24, num_seeds=num_seeds)
        return args, Path(dql.train(args)["folder"])

    return run
