"""Tasks that are not D4RL's: any environment from a Box of states to a Box of actions, and data for it."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from d4rl_tasks.environments import make_env
from d4rl_tasks.files import load_dataset
from d4rl_tasks.own_data import load_own
from d4rl_tasks.tasks import TASKS, BadInput, Task, is_ogbench, known_ids, package, reason, task_of, to_bounds


def find_task(env_id: str, backend: str = "maintained", score_range: tuple[float, float] | None = None,
              make: Callable | None = None) -> Task:  # fmt: skip
    """The task of an id, which knows how to make its environments and load its data: D4RL's, OGBench's, or any other.

    Args: score_range are the returns of scores 0 and 100; without it a score is the return. make is a function that
    returns the environment; env_id is then only a name. Otherwise gymnasium makes it, of an id like Pendulum-v1 or
    module:Env-v0. Whoever calls vouches for that module, which is imported.
    Raises: BadInput for an unknown id, an environment that cannot be made, or spaces that the method cannot use.
    """
    known = env_id in TASKS or is_ogbench(env_id)
    if known and make:
        raise BadInput(f"{env_id} has an environment of its own: give yours another name as env_id")
    if known and score_range:
        raise BadInput(f"{env_id} has a score of its own: leave out --score-range")
    if env_id in TASKS:
        task = task_of(env_id, backend)
        as_own = task._replace(bounds=np.array([[-1.0], [1.0]]).repeat(task.action_dim, 1))

        def load(source: Any) -> dict:
            return load_own(source, as_own) if isinstance(source, Mapping) else load_dataset(env_id, source, backend)

        return task._replace(make=lambda render_mode: make_env(env_id, backend, render_mode), load=load)
    if backend != "maintained":
        raise BadInput(f"--env-backend {backend} has D4RL's tasks only, not {env_id}")
    if is_ogbench(env_id):
        from d4rl_tasks.ogbench_tasks import ogbench_task

        return ogbench_task(env_id)
    of_mode = (lambda render_mode: make()) if make else partial(by_gymnasium, env_id)
    return task_of_environments(env_id, of_mode, score_range)


def by_gymnasium(env_id: str, render_mode: str | None) -> Any:
    """gymnasium's environment of that id. Raises BadInput if there is none."""
    gymnasium = package("gymnasium")
    if ":" in env_id and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the user's modules are, also for the command dql
    mode = {"render_mode": render_mode} if render_mode else {}  # which an environment need not know
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **mode)
    except ImportError as error:
        raise BadInput(f"{env_id} cannot be made: {reason(error)}") from None
    except gymnasium.error.NameNotFound:
        raise BadInput(f"unknown env id {env_id!r}; {known_ids(env_id)}; any other environment of gymnasium, or "
                       "module:Env-v0, goes with --dataset-path") from None  # fmt: skip
    except (gymnasium.error.Error, ValueError) as error:  # ValueError: two colons
        raise BadInput(f"{env_id} cannot be made by gymnasium: {reason(error)}") from None


def task_of_environments(name: str, make: Callable, score_range: tuple[float, float] | None) -> Task:
    """A task of the environments that make(render_mode) returns. Raises BadInput if their spaces do not suit."""
    package("gymnasium")
    from gymnasium.spaces import Box
    from gymnasium.wrappers import FlattenObservation, TransformAction

    env = make(None)
    states, actions = env.observation_space, env.action_space
    if not isinstance(states, Box):
        raise BadInput(f"{name}: observations are {states}, not a Box: wrap it in gymnasium's FlattenObservation")
    if not isinstance(actions, Box) or actions.shape[1:] or not actions.shape:
        raise BadInput(f"{name}: actions are {actions}, not a Box of one axis: the policy has continuous actions")
    bounds = np.stack([actions.low, actions.high]).astype(np.float64)
    if not (np.isfinite(bounds).all() and (bounds[0] < bounds[1]).all()):
        raise BadInput(f"{name}: actions are {actions}: their bounds must be finite, and low below high")

    def make_scaled(render_mode: str | None = None) -> Any:
        """For training: flat states, actions in [-1, 1]. To be rendered: actions as in the environment."""
        env = make(render_mode)
        if len(states.shape) != 1:
            env = FlattenObservation(env)
        if render_mode or (np.abs(bounds) == 1).all():
            return env
        unit = Box(-1, 1, actions.shape, np.float32)  # gymnasium's RescaleAction can end a little beyond the bounds
        return TransformAction(env, lambda action: to_bounds(action, *bounds).astype(actions.dtype), unit)

    limit = getattr(env.spec, "max_episode_steps", None) or 0
    low, high = score_range or (0.0, 100.0)  # a score is the return where nothing else is known
    task = Task(name, int(np.prod(states.shape)), len(bounds[0]), limit, low, high, "", bounds=bounds, make=make_scaled)
    env.close()
    return task._replace(load=lambda source: load_own(source, task))
