"""The folder of a run, and files that are written whole or not at all.

    runs/ENV__dql__SEED__TIME/    args.json, checkpoint.pt, metrics.csv, curve.png, summary.json, TensorBoard's events,
                                  and evaluation-STEP.pt, the policies that are reported or may yet be
                                  with several seeds, a folder seed-K for each with all of these; then metrics.csv and
                                  curve.png of the whole run are of all seeds, and events are in the seeds' folders
                                  evaluations.jsonl, if it was evaluated anew; wandb-id.txt, with --track
"""

import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from d4rl_tasks import BadInput, reason
from housekeeping.arguments import Args, as_json


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write with a path beside, then renames it: no reader and no crash ever finds the file half written.

    Raises BadInput if that fails, on a full disk say; the old file is then as it was.
    """
    beside = path.with_name(f".part-{path.name}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; what was there before is whole") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path: Path, contents: dict) -> None:
    write_whole(path, lambda beside: beside.write_text(json.dumps(contents, indent=2) + "\n"))


def write_torch(path: Path, contents: dict) -> None:
    """torch.save by way of memory: straight to a file, it would not say why it failed."""
    buffer = io.BytesIO()
    try:
        torch.save(contents, buffer)
    except (MemoryError, RuntimeError) as error:  # torch hides the first behind the second
        raise BadInput(f"no memory to write {path} ({reason(error)}); what was there before is whole") from None
    write_whole(path, lambda beside: beside.write_bytes(buffer.getbuffer()))


def seed_runs(args: Args, folder: Path) -> list[tuple[Path, Args]]:
    """Each seed's folder, and the arguments with which it could have been run alone."""
    if args.num_seeds == 1:
        return [(folder, args)]
    seeds = range(args.seed, args.seed + args.num_seeds)
    return [(folder / f"seed-{seed}", replace(args, seed=seed, num_seeds=1)) for seed in seeds]


def seed_folders(args: Args, folder: Path) -> list[Path]:
    """The folder of each seed: the run's own, or with several seeds one within for each."""
    return [path for path, _ in seed_runs(args, folder)]


def start_folder(args: Args) -> Path:
    """Makes the folder of a new run: --run-name, or ENV__dql__SEED__TIME, with bc for cloning and the name of a file
    given as data. Raises BadInput if that fails."""
    last = f"-{args.seed + args.num_seeds - 1}" if args.num_seeds > 1 else ""
    parts = [args.env_id.replace("/", "-"), "dql" if args.eta > 0 else "bc", f"{args.seed}{last}"]
    if args.dataset_path:
        parts.insert(2, args.dataset_path.stem[:60])
    given = args.run_name is not None
    name = args.run_name if given else "__".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    if Path(name).name != name or name in ("", ".."):
        raise BadInput(f"--run-name is {name!r}, it must be the name of a folder in --runs-dir")
    try:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        for others in itertools.count():  # runs that were started in the same second
            folder = args.runs_dir / (f"{name}-{others}" if others else name)
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                if given:
                    raise BadInput(f"{folder} exists: choose another --run-name, or give --resume {folder}") from None
    except OSError as error:
        raise BadInput(f"cannot make a folder in {args.runs_dir}: {error.strerror}; choose another --runs-dir or "
                       "--run-name") from None  # fmt: skip


def write_args(args: Args, folder: Path) -> None:
    """Writes args.json for each seed, whose folder is made if it is not there, and then for the run."""
    for path, own in seed_runs(args, folder):
        path.mkdir(exist_ok=True)
        write_json(path / "args.json", as_json(own))
    write_json(folder / "args.json", as_json(args))  # last, for it makes the folder one that can be resumed


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks a run's folder until the block or the process ends, in whatever way. Raises BadInput if it is locked."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another process is writing {folder}: wait for it, or stop it") from None
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {error.strerror}") from None
    try:
        for path in (*folder.glob("*"), *folder.glob("seed-*/*")):
            if path.is_symlink():
                raise BadInput(f"{path} is a link, and what it leads to would be overwritten: put the real one there")
        yield
    finally:
        lock.release()
