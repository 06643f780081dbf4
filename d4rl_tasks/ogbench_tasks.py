"""OGBench's single tasks (Park et al. 2025, arXiv 2410.20092), such as cube-single-play-singletask-v0.

Its own package makes the environments, reads the data and gives them rewards. It is no requirement.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from d4rl_tasks.download import download
from d4rl_tasks.files import checked
from d4rl_tasks.own_data import load_own, scaled
from d4rl_tasks.tasks import BadInput, Task, package, reason

gymnasium = package("gymnasium")
URL = "https://rail.eecs.berkeley.edu/datasets/ogbench/"


class Success(gymnasium.Wrapper):
    """An environment whose reward is 1 where an episode ends in success, and 0 elsewhere: its return is the score.

    OGBench's mazes draw from numpy's global generator: here each environment has that generator to itself, and a reset
    with a seed always begins the same episode.
    """

    numbers: Any = None  # the generator's state, as this environment left it

    @contextlib.contextmanager
    def own_numbers(self, seed: int | None = None) -> Iterator[None]:
        others = np.random.get_state()
        if seed is not None:
            np.random.seed(seed)
        elif self.numbers is not None:
            np.random.set_state(self.numbers)
        try:
            yield
        finally:
            self.numbers = np.random.get_state()
            np.random.set_state(others)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        with self.own_numbers(seed):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        with self.own_numbers():
            state, _, terminated, truncated, info = self.env.step(action)
        return state, float((terminated or truncated) and bool(info["success"])), terminated, truncated, info


def ogbench() -> Any:
    """The package. Raises BadInput if it is missing."""
    try:
        import ogbench
    except ImportError as error:
        raise BadInput(
            f"OGBench's tasks need its package ({reason(error)}): pip install ogbench==1.2.2 dm_control==1.0.26"
        ) from None
    warnings.filterwarnings("ignore", message=".*precision lowered by casting")  # of bounds
    return ogbench


def without_opengl(make: Callable[[], Any]) -> Any:
    """make(), also where the OpenGL library is missing that MUJOCO_GL names: what is not rendered needs none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing display
            return make()
    except gymnasium.error.Error:
        raise
    except Exception:  # such a library is missing in several ways
        with mock.patch.dict(os.environ, MUJOCO_GL="disable"):
            return make()


def ogbench_task(env_id: str) -> Task:
    """The task of that id: states are its own, and a score is the success rate in percent.

    Raises: BadInput if there is no such task, or its states are images, or the package is missing.
    """
    words = env_id.split("-")
    place = words.index("singletask")
    # as ogbench.utils.make_env_and_datasets: without the kind of data, and without the task
    env_name, file = "-".join(words[: place - 1] + words[place:]), "-".join(words[:place] + words[-1:]) + ".npz"

    def make(render_mode: str | None = None) -> Any:
        mode = {"render_mode": render_mode} if render_mode else {}
        try:
            env = without_opengl(partial(
                ogbench().make_env_and_datasets, env_id, env_only=True, disable_env_checker=True, **mode
            ))  # fmt: skip
        except gymnasium.error.Error as error:
            raise BadInput(f"unknown env id {env_id!r}: OGBench has no such task ({reason(error)})") from None
        return env if render_mode else Success(env)

    if words[0] in ("visual", "powderworld"):
        raise BadInput(f"{env_id}: its observations are images, which this method does not take")
    env = make()
    widths = env.observation_space.shape[0], env.action_space.shape[0]
    bounds = np.stack([env.action_space.low, env.action_space.high]).astype(np.float64)
    task = Task(env_id, *widths, env.spec.max_episode_steps, 0.0, 1.0, URL + file, bounds=bounds, make=make)

    def load(source: Any) -> dict:
        if isinstance(source, Mapping):
            return load_own(source, task)
        return read(data_file(task) if source is None else Path(os.path.expanduser(source)), task, env_name, env)

    return task._replace(load=load)


def data_file(task: Task) -> Path:
    """The path of the task's data file in $OGBENCH_DATASET_DIR, into which it is downloaded if it is not there."""
    folder = os.environ.get("OGBENCH_DATASET_DIR") or os.path.join("~", ".ogbench", "data")
    path = Path(os.path.expanduser(folder)) / task.url.rsplit("/", 1)[1]
    if not path.exists():
        download(task.url, path, "", lambda file: _arrays(file, task), mirrored=False)
    return path


def read(path: Path, task: Task, env_name: str, env: Any) -> dict[str, np.ndarray]:
    """The transitions of an OGBench file, with the rewards and ends that OGBench computes for the task.

    As in its own loader: the row at an episode's end only has the next observation of the row before. An episode that
    ends without success is cut off.
    """
    data = _arrays(path, task)
    try:
        ogbench().relabel_utils.relabel_dataset(env_name, env, data)
    except Exception as error:  # of numpy, where qpos is another task's
        raise BadInput(f"{path} is not OGBench's data of {task.family}: {reason(error)}") from None
    columns = {name: data[name] for name in ("observations", "actions", "rewards", "next_observations")}
    return scaled(checked(columns | {"terminals": data["masks"] == 0}, task, path), task)


def _arrays(path: Path, task: Task) -> dict[str, np.ndarray]:
    """What OGBench's loader returns for a file. Raises BadInput."""
    try:
        data = ogbench().load_dataset(path, add_info=True)
        widths = data["observations"].shape[1], data["actions"].shape[1]
        if "qpos" not in data:
            raise ValueError("it has no qpos, of which rewards are computed")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give OGBench's .npz file of {task.family}") from None
    except MemoryError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds of exception on damaged or other files
        raise BadInput(f"{path} is not OGBench's .npz file of {task.family}: {reason(error)}") from None
    if widths != task.widths:
        raise BadInput(f"{path} has {widths[0]} numbers of state and {widths[1]} of action, {task.family} has "
                       f"{task.state_dim} and {task.action_dim}")  # fmt: skip
    return data
