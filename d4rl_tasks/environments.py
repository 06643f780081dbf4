"""Environments of the tasks, one or many, and many of them stepped at once."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from d4rl_tasks.classic import Classic
from d4rl_tasks.errors import BadInput, package, reason
from d4rl_tasks.simulators import FAMILIES, Simulated
from d4rl_tasks.tasks import task_of

if TYPE_CHECKING:
    import gymnasium


def make_env(env_id: str, backend: str = "maintained", render_mode: str | None = None) -> gymnasium.Env:
    """The task's environment, equal to D4RL's.

    Observations are float64 (state_dim,), actions (action_dim,) in [-1, 1], episodes are truncated at
    max_episode_steps, and reset(seed=s) always begins the same episode. Environments of a kind share one compiled
    model, so the hundredth costs next to nothing. backend "d4rl" is the classic stack itself.
    Raises: BadInput for an unknown id or backend, or a package that is missing or of the wrong version.
    """
    task = task_of(env_id, backend)
    package("gymnasium")
    from gymnasium.wrappers import TimeLimit

    if backend == "d4rl":
        return _with_gymnasium(Classic)(env_id, render_mode)
    return TimeLimit(_with_gymnasium(FAMILIES[task.family])(env_id, render_mode), task.max_episode_steps)


def make_envs(env_id: str, n: int, backend: str = "maintained") -> list[gymnasium.Env]:
    """n environments of the task, for n episodes side by side; each may be stepped in a thread of its own."""
    return [make_env(env_id, backend) for _ in range(n)]


def rendering_env(env_id: str, backend: str = "maintained") -> gymnasium.Env:
    """An environment for a video, tested before the training starts. Raises BadInput if it cannot render."""
    package("moviepy")
    env, opengl = make_env(env_id, backend, render_mode="rgb_array"), os.environ.get("MUJOCO_GL")
    try:
        if opengl is not None:  # gymnasium's renderer would not end cleanly without the library
            importlib.import_module(f"mujoco.{opengl}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing backend, which the error below reports
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:  # every OpenGL backend fails in its own way
        raise BadInput(
            f"--capture-video cannot render with MUJOCO_GL={opengl or ''} ({reason(error)}): install libegl1 and set "
            "MUJOCO_GL=egl, or install libosmesa6 and set MUJOCO_GL=osmesa (packages of Debian and Ubuntu)"
        ) from None


@functools.cache
def _with_gymnasium(kind: type) -> type[gymnasium.Env]:
    """Makes kind a gymnasium.Env: only now, for this package must import without gymnasium."""
    import gymnasium

    return type(kind.__name__, (kind, gymnasium.Env), {})



def step_each(envs: list[gymnasium.Env], actions: np.ndarray) -> list[tuple]:
    """[env.step(action)] of each environment and its action, (n, action_dim), in order; on all cores, the same bits.

    Threads do, for MuJoCo releases Python's lock while it computes, and environments share nothing that changes.
    gymnasium's SyncVectorEnv steps one after the other, its AsyncVectorEnv in processes that each compile and hold a
    model, and mujoco.rollout takes all controls in advance, while a kitchen's depend on what is observed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slow = any(_is_slow(env.unwrapped) for env in envs[:1])  # one tells of all
    count = max(1, min(cores, len(envs))) if slow else 1
    bounds = [len(envs) * k // count for k in range(count + 1)]
    first, *rest = [(envs[start:end], actions[start:end]) for start, end in itertools.pairwise(bounds)]
    futures = [_threads(cores).submit(_step_in_turn, *share) for share in rest]
    return _step_in_turn(*first) + [result for future in futures for result in future.result()]


def _step_in_turn(envs: list[gymnasium.Env], actions: np.ndarray) -> list[tuple]:
    return [env.step(action) for env, action in zip(envs, actions, strict=True)]


def _is_slow(env: gymnasium.Env) -> bool:
    """Whether a step takes 0.2 ms or more, by time steps and degrees of freedom, so that threads gain.

    20 environments on two cores: kitchen 1.93 times as fast as in turn, antmaze 1.79, pen 1.71; but walker2d 1.05 to
    1.6, hopper 0.8 to 1.4, halfcheetah 0.66, where threads mostly wait for Python's lock.
    """
    return isinstance(env, Simulated) and env.frame_skip * env.model.nv >= 60


@functools.cache
def _threads(cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores - 1, thread_name_prefix="environments")


if hasattr(os, "register_at_fork"):  # a forked process does not have the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
