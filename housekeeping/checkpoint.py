"""A run's checkpoint: read back, checked and restored. `Run.save` writes it. And the policies kept beside it.

What a run does next depends on its arguments, its data and its checkpoint alone: killed at any moment and resumed, it
ends with the same bits.
"""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from d4rl_tasks import BadInput, reason
from housekeeping import report
from housekeeping.arguments import FREE, Args, as_json, may_grow
from housekeeping.folder import write_torch

ACTING = ("policy", "policy_ema", "critic_target")  # the networks that an agent acts by


def read_checkpoint(folder: Path, args: Args, device: torch.device, name: str = "checkpoint.pt") -> dict:
    """A run's last checkpoint, or its file of that name. Raises BadInput if it is missing, damaged or another run's."""
    path = folder / name
    if not path.exists():
        raise BadInput(f"{path} is missing: put a copy there, or begin a new run")
    try:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"its part {part} has changed")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        then = checkpoint["args"]
        if not all_finite(checkpoint["agents"]):
            raise ValueError("it holds numbers that are not finite")
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        # torch's advice against an UnpicklingError is to run the code in the file
        why = "it holds more than tensors and numbers" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise BadInput(f"{path} is damaged, or no checkpoint ({why}): put back an older copy of the whole folder, "
                       "or begin a new run; what was trained since that copy is lost") from None  # fmt: skip
    now = as_json(args)
    differ = [name for name in now if name not in FREE and then.get(name, now[name]) != now[name]]
    if "num_updates" in differ and may_grow(then["num_updates"], args.num_updates, args.lr_decay):
        differ.remove("num_updates")
    if differ:
        raise BadInput(f"{path} and args.json beside it are of two runs, with another {', '.join(differ)}: put back "
                       "the one that belongs there")  # fmt: skip
    return checkpoint


def evaluation_file(step: int) -> str:
    return f"evaluation-{step}.pt"


def keep_policy(folder: Path, args: Args, step: int, state: dict) -> None:
    """Writes the networks, in an agent's state, that the evaluation after so many updates acted by."""
    own = {name: value for name, value in as_json(args).items() if name not in FREE}  # the rest differs once resumed
    write_torch(folder / evaluation_file(step), {"agents": [{name: state[name] for name in ACTING}], "args": own})


def remove_policies(folder: Path, but: set[int]) -> None:
    """Removes the policies kept in a seed's folder, except those of these steps."""
    for path in folder.glob(evaluation_file("[0-9]*")):
        if path.name not in map(evaluation_file, but):
            path.unlink()


def read_policy(folder: Path, args: Args, device: torch.device, which: str = "last") -> dict:
    """The last checkpoint of a run of one seed, its agent acting as in the evaluation that `report.select` calls which,
    after "step" updates; its other networks and optimizers are the last. Raises BadInput."""
    checkpoint = read_checkpoint(folder, args, device)
    if which not in report.SELECTIONS:
        raise BadInput(f"which is {which!r}, it must be one of {', '.join(report.SELECTIONS)}")
    step, rows = checkpoint["progress"]["step"], checkpoint["progress"]["history"][0]
    if which != "last":
        if not report.to_keep(rows, args):
            raise BadInput(f"{folder} has made no evaluation yet: it has its last policy only")
        step = report.select(rows, args)[which]["step"]
        if not (path := folder / evaluation_file(step)).exists():
            raise BadInput(f"{path}, the {which} evaluation's policy, is missing: put a copy there, or take the last")
        checkpoint["agents"][0] |= read_checkpoint(folder, args, device, path.name)["agents"][0]
    return checkpoint | {"step": step}


def widths(checkpoint: dict, folder: Path) -> tuple[int, int]:
    """The numbers of a state and of an action that the networks in a checkpoint take. Raises BadInput."""
    try:
        policy = checkpoint["agents"][0]["policy"]
        action_dim, time_dim = len(policy["output.bias"]), len(policy["time_mlp.2.bias"])
        return policy["trunk.0.weight"].shape[1] - action_dim - time_dim, action_dim
    except Exception as error:
        raise of_another_version(folder, error) from None


def of_another_version(folder: Path, error: Exception) -> BadInput:
    return BadInput(f"{folder / 'checkpoint.pt'} was written by another version of this program ({reason(error)}): "
                    "go on with that version")  # fmt: skip


def load(checkpoint: dict, folder: Path, agents: list, generators: list[torch.Generator]) -> None:
    """Restores agents and, if there are any, generators. Raises BadInput if they are not those of the checkpoint."""
    try:
        for agent, state in zip(agents, checkpoint["agents"], strict=True):
            agent.load_state_dict(state)
        for generator, numbers in zip(generators, checkpoint["generators"], strict=bool(generators)):
            generator.set_state(numbers.cpu())
    except Exception as error:  # torch raises nearly anything on what does not fit
        raise of_another_version(folder, error) from None


def all_finite(state: dict | list | Tensor) -> Tensor:
    """Whether all tensors in a nested state are finite, (): a device tensor, which is not waited for."""
    leaves = torch.utils._pytree.tree_leaves(state)
    return torch.stack([x.isfinite().all() for x in leaves if isinstance(x, Tensor)]).all()
