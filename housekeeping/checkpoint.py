"""How far a run has come: saved, read back and restored.

What a run does next depends on its arguments, its data and its checkpoint alone: killed at any moment and resumed, it
ends with the same bits.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from d4rl_tasks import BadInput, reason
from housekeeping.arguments import FREE, as_json, may_grow
from housekeeping.folder import of_each_seed, seed_folders, write_torch
from housekeeping.machine import versions

if TYPE_CHECKING:
    from dql import Args, DiffusionQL


@dataclass
class Progress:
    """How far a run has come."""

    step: int  # updates made
    sums: Tensor  # (K, L): for each seed the losses since the last row of metrics.csv, added up
    seconds: float  # spent on updates since that row
    history: list[list[dict]]  # the rows of metrics.csv, for each seed
    data: int  # checksum of the data set
    kept: int = 0  # update of the last checkpoint


def checksum(data: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(data):
        crc = zlib.crc32(np.ascontiguousarray(data[name]), crc)
    return crc


def save(args: Args, folder: Path, states: list[dict], generators: list, progress: Progress) -> None:
    """Writes a checkpoint of each seed, usable by itself, and then that of all, from which the run is resumed.

    states are those of the seeds' agents. Raises BadInput if writing fails; then the old ones are as they were.
    """
    progress.kept = progress.step
    numbers, device = [generator.get_state() for generator in generators], progress.sums.device
    common = {"versions": versions(device), "device": device.type}
    whole = {"agents": states, "generators": numbers, "progress": vars(progress), "args": as_json(args)}
    if args.num_seeds > 1:
        for k, (path, own) in enumerate(zip(seed_folders(args, folder), of_each_seed(args), strict=True)):
            part = vars(progress) | {"sums": progress.sums[k : k + 1].clone(), "history": progress.history[k : k + 1]}
            one = {"agents": states[k : k + 1], "generators": numbers[k : k + 1], "progress": part}
            write_torch(path / "checkpoint.pt", one | {"args": as_json(own)} | common)
    write_torch(folder / "checkpoint.pt", whole | common)


def read_checkpoint(folder: Path, args: Args, device: torch.device) -> dict:
    """A run's last checkpoint, as `save` wrote it. Raises BadInput if it is missing, damaged or of another run."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise BadInput(f"{path} is missing: put a copy there if there is one, or begin a new run")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not check the sums of bytes
            if part := file.testzip():
                raise ValueError(f"its part {part} has changed")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        then = checkpoint["args"]
        checkpoint["agents"], checkpoint["generators"], checkpoint["progress"], checkpoint["versions"]  # all there
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        why = "it holds more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise BadInput(f"{path} is damaged, or no checkpoint ({why}): put back an older copy of the whole "
                       "folder, or begin a new run; what was trained since that copy is lost") from None  # fmt: skip
    now = as_json(args)
    differ = [name for name in now if name not in FREE and then.get(name, now[name]) != now[name]]
    if may_grow(then.get("num_updates"), args.num_updates, args.lr_decay):
        differ.remove("num_updates")
    if differ:
        raise BadInput(f"{path} and args.json beside it are of two runs, with another {', '.join(differ)}: put back "
                       "the one that belongs there")  # fmt: skip
    return checkpoint


def load_agents(agents: list[DiffusionQL], checkpoint: dict, folder: Path) -> None:
    """Restores agents. Raises BadInput if the checkpoint's networks are not theirs."""
    try:
        for agent, state in zip(agents, checkpoint["agents"], strict=True):
            agent.load_state_dict(state)
    except Exception as error:  # torch raises nearly anything on what does not fit
        raise BadInput(f"{folder / 'checkpoint.pt'} was written by another version of this program ({reason(error)}): "
                       "go on with that version") from None  # fmt: skip


def restore(args: Args, agents: list[DiffusionQL], generators: list, begun: Progress) -> Progress:
    """Restores agents and generators from the checkpoint of the run args.resume; returns its progress.

    begun is this process's fresh Progress. Raises BadInput if the checkpoint is damaged, or of another run, device or
    data. Warns if versions differ.
    """
    folder, device = args.resume, begun.sums.device
    checkpoint = read_checkpoint(folder, args, device)
    if checkpoint["device"] != device.type:
        raise BadInput(f"{folder} ran on {checkpoint['device']}, and resumes exactly only there: see --device")
    if checkpoint["progress"]["data"] != begun.data:
        raise BadInput(f"the data are no longer those that {folder} began with: bring those back, or begin a new run")
    load_agents(agents, checkpoint, folder)
    for generator, numbers in zip(generators, checkpoint["generators"], strict=True):
        generator.set_state(numbers.cpu())
    path = {name: getattr(args, name) for name in ("compile", "cudagraphs")}
    for name, value in (versions(device) | path).items():
        before = (checkpoint["versions"] | checkpoint["args"]).get(name)
        if before != value:
            print(f"warning: {name} was {before} and is {value}: results may differ in rounding", file=sys.stderr)
    return Progress(**checkpoint["progress"])
