"""The table of tasks as d4rl 1.1 registers them, normalized scores, and the error that a user can fix."""

import difflib
import importlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class BadInput(ValueError):
    """An error that the user can fix; the message is one line that says what is wrong and how to fix it."""

    exit_code = 2

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) < 2000 else f"{line[:1000]} [...] {line[-900:]}")


def reason(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def package(name: str) -> types.ModuleType:
    """Imports a package of requirements.txt. Raises BadInput if it is missing or cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{name} cannot be imported ({reason(error)}): pip install -r requirements.txt") from None


class Task(NamedTuple):
    family: str  # whose environment: halfcheetah, hopper, walker2d, antmaze, pen, kitchen or maze
    state_dim: int
    action_dim: int
    max_episode_steps: int
    ref_min_score: float  # return of D4RL's random policy, 0 on the normalized scale
    ref_max_score: float  # return of D4RL's expert, 100 on the normalized scale
    url: str  # of the data file; empty for the two demos, whose files come with this project
    sha256: str = ""  # of the published file, where known
    # of tasks that are not D4RL's:
    bounds: np.ndarray | None = None  # (2, action_dim), the lowest and the highest action of the environment
    make: Callable[[str | None], Any] | None = None  # from a render_mode to an environment, as `make_env`
    load: Callable[[Any], dict] | None = None  # from what was given as data to arrays, as `load_dataset`

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers of a state and of an action."""
        return self.state_dim, self.action_dim


RAIL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
SHA256 = {  # of published files
    "mini_kitchen_microwave_kettle_light_slider-v0.hdf5":
        "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81",
    "hopper_medium_replay-v2.hdf5": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "walker2d_medium_replay-v2.hdf5": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "hopper_medium_expert-v2.hdf5": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
}  # fmt: skip


def _tasks() -> dict[str, Task]:
    """The tasks as d4rl 1.1 registers them (its infos.py and __init__.py files)."""
    tasks = {}

    def add(env_id: str, file: str, *numbers: float) -> None:
        tasks[env_id] = Task(env_id.split("-")[0], *numbers, RAIL + file, SHA256.get(file.split("/")[1], ""))

    for data in ("medium", "medium-replay", "medium-expert"):
        file = f"{data.replace('-', '_')}-v2.hdf5"
        add(f"halfcheetah-{data}-v2", f"gym_mujoco_v2/halfcheetah_{file}", 17, 6, 1000, -280.178953, 12135.0)
        add(f"hopper-{data}-v2", f"gym_mujoco_v2/hopper_{file}", 11, 3, 1000, -20.272305, 3234.3)
        add(f"walker2d-{data}-v2", f"gym_mujoco_v2/walker2d_{file}", 17, 6, 1000, 1.629008, 4592.3)
    for maze, file, steps in (
        ("umaze", "u-maze_noisy_multistart_False_multigoal_False", 700),
        ("umaze-diverse", "u-maze_noisy_multistart_True_multigoal_True", 700),
        ("medium-play", "big-maze_noisy_multistart_True_multigoal_False", 1000),
        ("medium-diverse", "big-maze_noisy_multistart_True_multigoal_True", 1000),
        ("large-play", "hardest-maze_noisy_multistart_True_multigoal_False", 1000),
        ("large-diverse", "hardest-maze_noisy_multistart_True_multigoal_True", 1000),
    ):
        add(f"antmaze-{maze}-v0", f"ant_maze_new/Ant_maze_{file}_sparse.hdf5", 29, 8, steps, 0.0, 1.0)
    for data in ("human", "cloned"):
        add(f"pen-{data}-v1", f"hand_dapg_v1/pen-{data}-v1.hdf5", 45, 24, 100, 96.262799, 3076.8331017826877)
    for data, file in (
        ("complete", "mini_kitchen_microwave_kettle_light_slider"),
        ("partial", "kitchen_microwave_kettle_light_slider"),
        ("mixed", "kitchen_microwave_kettle_bottomburner_light"),
    ):
        add(f"kitchen-{data}-v0", f"kitchen/{file}-v0.hdf5", 60, 9, 280, 0.0, 4.0)
    tasks["halfcheetah-demo-v0"] = tasks["halfcheetah-medium-v2"]._replace(url="")
    # 0 is an episode that never arrives, 100 the shortest way (bench/make_maze_demo.py)
    tasks["maze-demo-v0"] = Task("maze", 2, 2, 30, -30.0, -4.0, "")
    return tasks


TASKS = _tasks()


def task_of(env_id: str | Task, backend: str = "maintained") -> Task:
    """D4RL's task of that id; a Task, as `find_task` returns, is itself.

    Raises: BadInput for an unknown backend, or an unknown id: it lists all, closest first.
    """
    if isinstance(env_id, Task):
        return env_id
    if env_id not in TASKS:
        raise BadInput(f"unknown env id {env_id!r}; {known_ids(env_id)}")
    if backend not in ("maintained", "d4rl"):
        raise BadInput(f"unknown backend {backend!r}: it is 'maintained' or 'd4rl'")
    if backend == "d4rl" and env_id == "maze-demo-v0":
        raise BadInput(f"--env-backend d4rl has D4RL's tasks only, not {env_id}")
    return TASKS[env_id]


def known_ids(env_id: str) -> str:
    """The tasks' ids, the one most like env_id first, in a sentence."""
    known = difflib.get_close_matches(env_id, TASKS, n=len(TASKS), cutoff=0.0)
    return f"the ids are, closest first: {', '.join(known)}"


def normalized_score(env_id: str | Task, return_: Any) -> Any:
    """100 (return - random) / (expert - random), of a number or an array of returns (D4RL, section 5)."""
    task = task_of(env_id)
    return 100.0 * (return_ - task.ref_min_score) / (task.ref_max_score - task.ref_min_score)


def is_ogbench(env_id: str) -> bool:
    """Whether it is the id of one of OGBench's single tasks, such as cube-single-play-singletask-v0."""
    return "singletask" in env_id.split("-") and ":" not in env_id


def score_name(env_id: str, score_range: tuple[float, float] | None = None) -> str:
    """What a score of this task is: a normalized score, a success rate, or the return itself."""
    if is_ogbench(env_id):
        return "success rate in %"
    return "normalized score" if env_id in TASKS or score_range else "return"


def score_range(env_id: str, own: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """The returns of the normalized scores 0 and 100; None where scores are not normalized."""
    return (TASKS[env_id].ref_min_score, TASKS[env_id].ref_max_score) if env_id in TASKS else own


def reference_gamma(env_id: str) -> float:
    """The discount that the task's published results were trained with.

    OGBench's: FQL (Park et al. 2025, arXiv 2502.02538) takes 0.995 where episodes are long, in giant mazes, with the
    humanoid and in antsoccer, and OGBench in pointmaze-giant; 0.99 elsewhere, as Diffusion-QL does in D4RL's.
    """
    long = is_ogbench(env_id) and any(word in env_id for word in ("giant", "humanoidmaze", "antsoccer"))
    return 0.995 if long else 0.99


def to_bounds(action: Any, low: Any, high: Any) -> Any:
    """Actions (..., A) in [-1, 1] as the environment's, between low and high (A,); numpy's or torch's."""
    return (low + (action + 1) * ((high - low) / 2)).clip(low, high)
