"""Data of one's own, for tasks that are not D4RL's: HDF5 files, .npz files, Minari folders, arrays."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_tasks.files import checked, read_hdf5, read_minari, transitions
from d4rl_tasks.tasks import BadInput, Task

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("next_observations", "timeouts")


def load_own(source: Any, task: Task) -> dict[str, np.ndarray]:
    """The transitions of an HDF5 file of D4RL's layout, of an .npz file, of a Minari folder, or of a dict of arrays.

    The next observations are next_observations or, where there are none, the rows after: then timeouts must mark where
    an episode is cut off, and these rows and the last one are left out.
    Returns: arrays as `load_dataset`'s, actions scaled to [-1, 1], and action_bounds (2, action_dim), float64.
    Raises: BadInput if the data cannot be read or used, as where actions are outside the environment's bounds.
    """
    if source is None:
        raise BadInput(f"{task.family} has no data of its own: give a file with --dataset-path")
    if isinstance(source, Mapping):
        return scaled(_from_columns({k: np.asarray(v) for k, v in source.items()}, task, "data"), task)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return scaled(read_minari(path, task), task)
    if path.suffix == ".npz":
        return scaled(_from_columns(read_npz(path), task, path), task)
    return scaled(_next_rows(read_hdf5(path, task, OPTIONAL), task, path), task)


def scaled(data: dict[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Data with actions scaled from the environment's bounds to [-1, 1], and with these bounds."""
    low, high = task.bounds
    actions = 2 * (data["actions"] - low) / (high - low) - 1
    return data | {"actions": actions.clip(-1, 1).astype(np.float32), "action_bounds": task.bounds}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, in D4RL's layout.

    In OGBench's, terminals mark the last row of each episode, and masks are 0 where the task is done, or 1.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in (*REQUIRED, *OPTIONAL, "masks") if name in file}
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give an HDF5 or .npz file, or a Minari folder") from None
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds of exception on damaged files
        raise BadInput(f"{path} cannot be read as .npz ({error}): if it is damaged, fetch it again") from None
    if "timeouts" in columns or not {"rewards", "terminals"} <= columns.keys():
        return columns
    if "masks" not in columns:
        raise BadInput(f"{path} has neither masks (OGBench's: 0 where the task is done) nor timeouts (D4RL's): add one")
    return columns | {"terminals": columns["masks"] == 0, "timeouts": columns["terminals"]}


def _from_columns(columns: dict[str, np.ndarray], task: Task, place: Any) -> dict[str, np.ndarray]:
    if missing := [name for name in REQUIRED if name not in columns]:
        raise BadInput(f"{place} has no {' and no '.join(missing)}: it needs {', '.join(REQUIRED)}, and "
                       "next_observations or timeouts")  # fmt: skip
    if not columns["observations"].ndim:
        raise BadInput(f"{place}: observations are no array of rows")
    names = [name for name in (*REQUIRED, *OPTIONAL) if name in columns]
    return _next_rows(checked({name: columns[name] for name in names}, task, place), task, place)


def _next_rows(columns: dict[str, np.ndarray], task: Task, place: Any) -> dict[str, np.ndarray]:
    """Transitions, of checked columns."""
    if "next_observations" in columns:
        if not len(columns["rewards"]):
            raise BadInput(f"{place} holds no transition")
        return {name: values for name, values in columns.items() if name != "timeouts"}
    if "timeouts" not in columns:
        raise BadInput(f"{place} has neither next_observations nor timeouts: add one, timeouts being true where an "
                       "episode is cut off")  # fmt: skip
    return transitions(columns, task, place)
