"""Data files as arrays: D4RL's HDF5 files, by D4RL's rule of rows, and Minari's folders. What does not fit is refused.

Data of tasks that are not D4RL's are read by own_data.py, with the same functions.

Nothing in a data file is imported, called or unpickled. Both kinds are read by h5py: the package minari makes the
environment that metadata.json names where it lists no spaces, and so runs whatever is named there.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_tasks.download import download
from d4rl_tasks.next_rows import check_next_rows
from d4rl_tasks.tasks import BadInput, Task, package, task_of

HERE = Path(__file__).parent  # the demos' files are within the package where it is installed, and otherwise beside it
DEMO_FILES = (HERE if (HERE / "demo").is_dir() else HERE.parent) / "demo"


def load_dataset(env_id: str | Task, path: str | os.PathLike | None = None, backend: str = "maintained") -> dict:
    """The task's transitions, exactly those of D4RL 1.1's `qlearning_dataset`, or those of a Minari data set.

    Args: path is a D4RL HDF5 file or a Minari folder; without it, D4RL's file in $D4RL_DATASET_DIR (by default
    ~/.d4rl/datasets), which is downloaded if it is not there. backend "d4rl" reads with d4rl itself.
    Data of a Task of `find_task` are loaded by its load.
    Returns: numpy arrays observations and next_observations (n, state_dim), actions (n, action_dim) in [-1, 1], rewards
    (n,), all float32, neither normalized nor clipped, and terminals (n,) bool; rows in file order.
    Raises: BadInput if the data cannot be had, read or used.
    """
    task = task_of(env_id, backend)
    try:
        if task.load:
            return task.load(path)
        path = Path(os.path.expanduser(path)) if path is not None else _data_file(task)
        if backend == "d4rl":
            from d4rl_tasks.classic import classic_dataset

            return classic_dataset(env_id, path)
        data = read_minari(path, task) if os.path.isdir(path) else _read_d4rl(path, task)
        if (largest := np.abs(data["actions"]).max()) > 1.00001:
            warnings.warn(f"{path}: actions reach {largest:g}; the policy's end at 1", stacklevel=2)
        return data
    except MemoryError:
        name = task.family if task.load else env_id
        raise BadInput(f"the data of {name} do not fit into memory: free some, or give a smaller file") from None


def _own_path(task: Task) -> Path:
    """Where the task's data file lies, or will once it is downloaded."""
    if not task.url:
        return DEMO_FILES / f"{task.family}-demo-v0.hdf5"
    folder = os.environ.get("D4RL_DATASET_DIR") or os.path.join("~", ".d4rl", "datasets")
    return Path(os.path.expanduser(folder)) / task.url.rsplit("/", 1)[1]


def _data_file(task: Task) -> Path:
    """The path of the task's data file, which is downloaded if it is not there."""
    path = _own_path(task)
    if task.url and not os.path.exists(path):
        package("h5py")  # nothing is downloaded that could not be read
        download(task.url, path, task.sha256, lambda file: read_hdf5(file, task))
    return path


def is_published(task: Task, source: Any) -> bool:
    """Whether source, as given to `load_dataset`, is the data that the paper's score of a task of D4RL is of.

    That is the task's own file, known by where it lies or by its sha256.
    """
    if source is None or isinstance(source, Mapping):
        return source is None
    path = Path(os.path.expanduser(source))
    if path.resolve() == _own_path(task).resolve():
        return True
    return bool(task.sha256) and path.is_file() and package("pooch").file_hash(str(path)) == task.sha256


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The HDF5 file, open to be read; whatever goes wrong meanwhile becomes BadInput."""
    try:
        with package("h5py").File(path, "r") as file:
            yield file
    except (BadInput, MemoryError):
        raise
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give a D4RL HDF5 file or the folder of a Minari data set") from None
    except Exception as error:  # h5py raises nearly every kind of exception on damaged files
        raise BadInput(f"{path} cannot be read as HDF5 ({error}): if it is damaged, fetch it again") from None


def read_hdf5(path: Path, task: Task, optional: tuple[str, ...] = ("timeouts",)) -> dict[str, np.ndarray]:
    """Observations, actions and rewards (float32), terminals (bool) and, where the file has them, the optional ones."""
    with _open(path) as file:
        names = ("observations", "actions", "rewards", "terminals", *(name for name in optional if name in file))
        return checked({name: _column(file, name, path) for name in names}, task, path)


def _read_d4rl(path: Path, task: Task) -> dict[str, np.ndarray]:
    """The transitions of a D4RL file. Raises BadInput if its next_observations contradict D4RL's rule."""
    rows = read_hdf5(path, task)
    with _open(path) as file:
        is_published = path.name == task.url.rsplit("/", 1)[-1]
        check_next_rows(file.get("next_observations"), rows, _kept(rows, task), is_published, path)
    return transitions(rows, task, path)


def read_minari(folder: Path, task: Task) -> dict[str, np.ndarray]:
    """The transitions of a Minari data set; a truncated step is one of them, for its next observation is there."""
    path = (folder / "data" if (folder / "data").is_dir() else folder) / "main_data.hdf5"
    if not path.exists():
        raise BadInput(f"{path} does not exist: give a D4RL file, or Minari data of format hdf5 (arrow is not read)")
    episodes = []
    with _open(path) as file:
        for k in range(len(file)):
            place = f"{path}, episode_{k}"
            names = ("observations", "actions", "rewards", "terminations")
            states, actions, rewards, terminals = (_column(file[f"episode_{k}"], name, place)[...] for name in names)
            columns = {"observations": states[:-1], "actions": actions, "rewards": rewards, "terminals": terminals}
            episodes.append(checked(columns | {"next_observations": states[1:]}, task, place))
    if not any(len(episode["rewards"]) for episode in episodes):
        raise BadInput(f"{path} holds no transition: give a data set of at least one step")
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def _column(group: Any, name: str, place: object) -> Any:
    """The h5py data set of that name in a file or in an episode, its group."""
    if name not in group:
        raise BadInput(f"{place} has no {name}: is it D4RL's or Minari's, and complete?")
    if getattr(group[name], "shape", None) is None:  # a group, as of a Dict of observations
        raise BadInput(f"{place}: {name} are no plain array: flatten them (Dict observations are not read)")
    return group[name]


def checked(columns: dict[str, Any], task: Task, place: object) -> dict[str, np.ndarray]:
    """Columns of h5py or numpy as float32, and flags as bool. Raises BadInput unless they fit the task."""
    rows = columns["observations"].shape[:1]
    widths = {"observations": task.state_dim, "next_observations": task.state_dim, "actions": task.action_dim}
    shapes = {name: (*rows, widths[name]) if name in widths else rows for name in columns}
    for name, column in columns.items():  # all before any is read, for a damaged shape may claim terabytes
        shape, wanted = column.shape, shapes[name]
        flat = (*shape[:1], math.prod(shape[1:]))  # what is not D4RL's is flattened
        fits = flat == wanted and task.bounds is not None if name in widths else shape == (*rows, 1)
        if shape[:1] != rows:
            raise BadInput(f"{place}: {name} have {shape[0] if shape else 0:,} rows, observations {rows[0]:,}: give as "
                           "many of each")  # fmt: skip
        if shape != wanted and not fits:
            raise BadInput(f"{place}: {name} have shape {shape} instead of {wanted}: are they {task.family}'s?")
        if column.dtype.kind not in "biuf":
            raise BadInput(f"{place}: {name} are of type {column.dtype}, not numbers: write them as float32")
    arrays = {}
    for name, column in columns.items():
        flag = name in ("terminals", "timeouts")
        values = (column[...] if flag else column.astype(np.float32)[...]).reshape(shapes[name])
        if not np.isfinite(values).all():
            row = np.flatnonzero(~np.isfinite(values).reshape(*rows, -1).all(axis=1))[0]
            raise BadInput(f"{place}: {name} of row {row} are not finite in float32: fix or leave out that row")
        if name == "actions":
            _check_range(values, task, place)
        arrays[name] = values != 0 if flag else values
    return arrays


def _check_range(actions: np.ndarray, task: Task, place: object) -> None:
    """Raises BadInput for actions (n, A) out of bounds. They are not clipped: the scale would be wrong."""
    if task.bounds is None:
        largest = np.abs(actions).max(initial=0)
        if largest > 2:
            raise BadInput(f"{place}: actions reach {largest:g}, D4RL's lie in [-1, 1]: rescale them")
    elif len(actions):
        (low, high), least, most = task.bounds, actions.min(0), actions.max(0)
        beyond = (least < low - 1e-4 * (high - low)) | (most > high + 1e-4 * (high - low))
        if beyond.any():
            k = int(beyond.argmax())
            raise BadInput(f"{place}: actions lie in [{least[k]:g}, {most[k]:g}] in column {k}, those of {task.family} "
                           f"in [{low[k]:g}, {high[k]:g}]: give them in the environment's own bounds")  # fmt: skip


def _kept(rows: dict[str, np.ndarray], task: Task) -> np.ndarray:
    """Which rows but the last, (n - 1,), are transitions: those at which no episode is truncated."""
    truncated = rows["timeouts"] if "timeouts" in rows else _count_ends(rows["terminals"], task.max_episode_steps)
    return ~truncated[:-1]


def transitions(rows: dict[str, np.ndarray], task: Task, path: object) -> dict[str, np.ndarray]:
    """D4RL's choice of rows: not the last one, which has no successor, and none at which an episode is truncated."""
    kept = _kept(rows, task)
    if not kept.any():
        raise BadInput(f"{path} holds no transition: it takes two rows at least, and one that is no timeout")
    columns = {name: rows.pop(name)[:-1][kept] for name in ("actions", "rewards", "terminals")}  # pop spares memory
    observations = rows.pop("observations")
    return {"observations": observations[:-1][kept], **columns, "next_observations": observations[1:][kept]}


def _count_ends(terminals: np.ndarray, limit: int) -> np.ndarray:
    """The rows (n,) that D4RL takes for truncated in a file without timeouts: the loop of d4rl.qlearning_dataset.

    The count goes on from 0 after a row left out, and from 1 after a terminal row.
    """
    truncated, count = [], 0
    for terminal in terminals.tolist():  # a list of bools: numpy's own elements take ten times as long
        truncated.append(count == limit - 1)
        count = 0 if truncated[-1] else 1 if terminal else count + 1
    return np.array(truncated, bool)
