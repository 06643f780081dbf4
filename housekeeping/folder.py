"""The folder of a run, and files that are written whole or not at all.

    runs/ENV__dql__SEED__TIME/    args.json, checkpoint.pt, summary.json and, with one seed, metrics.csv, curve.png and
                                  TensorBoard's events; with several seeds, a folder seed-K for each with all of these
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d4rl_tasks import BadInput
from housekeeping.arguments import as_json

if TYPE_CHECKING:
    from dql import Args


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
    torch.save(contents, buffer)
    write_whole(path, lambda beside: beside.write_bytes(buffer.getbuffer()))


@contextmanager
def files_beside(folder: Path) -> Iterator[Path]:
    """Yields the path of a folder to make and fill; at the end its files are moved into the folder given.

    Raises BadInput if that fails.
    """
    beside = folder / ".part-files"
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
        yield beside
        for path in beside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.replace(folder / path.name)
    except OSError as error:
        raise BadInput(f"cannot write in {beside}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def seed_folders(args: Args, folder: Path) -> list[Path]:
    """The folder of each seed: the run's own, or with several seeds a folder within for each."""
    if args.num_seeds == 1:
        return [folder]
    return [folder / f"seed-{seed}" for seed in range(args.seed, args.seed + args.num_seeds)]


def of_each_seed(args: Args) -> list[Args]:
    """The arguments with which each seed could have been run alone."""
    return [replace(args, seed=args.seed + k, num_seeds=1) for k in range(args.num_seeds)]


def start_folder(args: Args) -> Path:
    """Makes the run's folder and writes args.json. Raises BadInput if that fails."""
    last = f"-{args.seed + args.num_seeds - 1}" if args.num_seeds > 1 else ""
    name = f"{args.env_id}__dql__{args.seed}{last}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder, others = args.runs_dir / name, 0
    try:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                break
            except FileExistsError:
                others += 1
                folder = args.runs_dir / f"{name}-{others}"
        try:
            write_args(args, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: BadInput, and names that no system takes
        why = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"cannot write the run's folder {folder}: {why}; choose a --runs-dir") from None
    return folder


def write_args(args: Args, folder: Path) -> None:
    """Writes args.json for each seed, whose folder is made if it is not there, and then for the run."""
    if args.num_seeds > 1:
        for path, own in zip(seed_folders(args, folder), of_each_seed(args), strict=True):
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
        if links := [path for path in folder.rglob("*") if path.is_symlink()]:
            raise BadInput(f"{links[0]} is a link, and what it leads to would be overwritten: put the real one there")
        yield
    finally:
        lock.release()
