"""Environments of the tasks, one or many, and many of them stepped at once."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from d4rl_tasks.tasks import BadInput, Task, package, reason, task_of

if TYPE_CHECKING:
    import gymnasium


def make_env(env_id: str | Task, backend: str = "maintained", render_mode: str | None = None) -> gymnasium.Env:
    """The task's environment, equal to D4RL's; that of a Task of `find_task` is made by its make.

    Observations are float64 (state_dim,), actions (action_dim,) in [-1, 1]; episodes are truncated at
    max_episode_steps; reset(seed=s) always begins the same episode; environments of a kind share one compiled model.
    backend "d4rl" is the classic stack itself.
    Raises: BadInput for an unknown id or backend, or a package that is missing or of the wrong version.
    """
    task = task_of(env_id, backend)
    if task.make:
        return task.make(render_mode)
    package("gymnasium")
    from gymnasium.spaces import Box
    from gymnasium.wrappers import TimeLimit

    if backend == "d4rl":
        from d4rl_tasks.classic import Classic as Kind
    elif task.family == "maze":
        from d4rl_tasks.demo_maze import Maze as Kind
    else:
        from d4rl_tasks.simulators import FAMILIES

        Kind = FAMILIES[task.family]
    env = Kind(env_id, render_mode)
    env.observation_space = Box(-np.inf, np.inf, (task.state_dim,), np.float64)
    env.action_space = Box(-1.0, 1.0, (task.action_dim,), np.float32)
    return env if backend == "d4rl" else TimeLimit(env, task.max_episode_steps)


def make_envs(env_id: str | Task, n: int, backend: str = "maintained") -> list[gymnasium.Env]:
    """n environments of the task, for n episodes side by side; each may be stepped in a thread of its own."""
    return [make_env(env_id, backend) for _ in range(n)]


def rendering_env(env_id: str | Task, backend: str = "maintained") -> gymnasium.Env:
    """An environment for a video, tested before the training starts. Raises BadInput if it cannot render."""
    package("moviepy")
    env, opengl = make_env(env_id, backend, render_mode="rgb_array"), os.environ.get("MUJOCO_GL")
    try:
        if opengl is not None:  # gymnasium's renderer would not end cleanly without the library
            importlib.import_module(f"mujoco.{opengl}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing backend, which the error below reports
            env.reset(seed=0)
            if env.render() is None:
                raise ValueError("it renders nothing: make it with render_mode 'rgb_array'")
        return env
    except Exception as error:  # every OpenGL backend fails in its own way
        raise BadInput(
            f"--capture-video cannot render with MUJOCO_GL={opengl or ''} ({reason(error)}): install libegl1 and set "
            "MUJOCO_GL=egl, or install libosmesa6 and set MUJOCO_GL=osmesa (packages of Debian and Ubuntu)"
        ) from None


def step_each(envs: list[gymnasium.Env], actions: np.ndarray) -> list[tuple]:
    """[env.step(action)] of each environment and its action, (n, action_dim), in order; on all cores, the same bits.

    Threads do, for MuJoCo releases Python's lock while it computes, and environments share nothing that changes.
    gymnasium's SyncVectorEnv steps one after the other, its AsyncVectorEnv in processes that each compile and hold a
    model, and mujoco.rollout takes all controls in advance, while a kitchen's depend on what is observed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gain = any(getattr(getattr(env, "unwrapped", env), "threads_gain", False) for env in envs[:1])  # one tells of all

    def step(share: Iterable[int]) -> list[tuple]:
        return [envs[k].step(actions[k]) for k in share]

    if cores == 1 or not gain:
        return step(range(len(envs)))
    shares = np.array_split(np.arange(len(envs)), min(cores, len(envs)))
    return [result for results in _threads(cores).map(step, shares) for result in results]


@functools.cache
def _threads(cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores, thread_name_prefix="environments")


if hasattr(os, "register_at_fork"):  # a forked process does not have the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
