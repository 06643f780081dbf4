"""The classic stack: environments and data files by gym, mujoco-py and d4rl themselves (requirements-classic.txt)."""

import collections.abc
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from d4rl_tasks.tasks import BadInput, package

gymnasium = package("gymnasium")


def classic_make(env_id: str) -> Any:
    """gym.make(env_id); that of halfcheetah-demo-v0 is halfcheetah-medium-v2's."""
    try:
        collections.Mapping = collections.abc.Mapping  # d4rl's kitchen looks for it where it was before Python 3.10
        import gym

        if find_spec("mjrl") is None:  # not on PyPI; d4rl needs only its base class, which gym has too
            from gym.envs import mujoco

            sys.modules |= {"mjrl": gym.envs, "mjrl.envs": mujoco, "mjrl.envs.mujoco_env": mujoco.mujoco_env}
        import d4rl  # noqa: F401  (registers its environments)

        return gym.make(env_id.replace("-demo-v0", "-medium-v2"))
    except Exception as error:  # of whatever kind: packages, compilers and libraries may be missing
        raise BadInput(
            f"backend 'd4rl' needs gym, mujoco-py and d4rl ({error}): pip install -r requirements-classic.txt"
        ) from None


def classic_dataset(env_id: str, path: Path) -> dict[str, np.ndarray]:
    """The transitions of a D4RL file, by d4rl.qlearning_dataset."""
    env = classic_make(env_id)
    import d4rl

    try:
        return d4rl.qlearning_dataset(env, dataset=env.get_dataset(h5path=str(path)))
    except Exception as error:  # whatever h5py says, or d4rl's assertions
        raise BadInput(f"{path} cannot be read by d4rl ({error}): is it D4RL's data of {env_id}?") from None


class Classic(gymnasium.Env):
    """An environment of the classic stack (gym), with gymnasium's interface."""

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.classic, self.render_mode = classic_make(env_id), render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            inner = self.classic.unwrapped
            inner = getattr(inner, "wrapped_env", inner)  # d4rl's wrapper of antmaze swallows the seed
            inner.seed(seed)
            if hasattr(inner, "set_target"):  # antmaze draws its goal from numpy's global generator
                state = np.random.get_state()
                np.random.seed(seed)
                inner.set_target()
                np.random.set_state(state)
        return self.classic.reset(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, done, info = self.classic.step(action)
        truncated = info.get("TimeLimit.truncated", False)
        return observation, float(reward), bool(done and not truncated), truncated, {}

    def render(self) -> np.ndarray:
        return self.classic.render(mode=self.render_mode)

    def close(self) -> None:
        self.classic.close()
