"""Tests of the classic backend, on a gym that behaves as d4rl's."""

import sys
import types

import numpy as np
import pytest
from data_files import HOPPER, bad_input, rows_of, write

from d4rl_tasks import load_dataset, make_env
from d4rl_tasks.files import DEMO_FILES


def test_classic_backend_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gym", None)
    path = write(tmp_path / "d.hdf5", rows_of(5))
    for call in (lambda: make_env(HOPPER, "d4rl"), lambda: load_dataset(HOPPER, path, "d4rl")):
        bad_input(call, "backend 'd4rl'", "requirements-classic.txt")


@pytest.fixture
def fake_classic(monkeypatch):
    """A gym that behaves as d4rl's: a seed method, four values per step, a goal from numpy's global generator."""
    pytest.importorskip("gymnasium")

    class Inner:
        def seed(self, seed):
            self.rng = np.random.RandomState(seed)

        def set_target(self):
            self.goal = np.random.uniform(size=2)

    class Classic:
        def __init__(self, env_id):
            self.env_id, self.wrapped_env, self.unwrapped, self.t = env_id, Inner(), self, 0
            self.wrapped_env.seed(None)

        def reset(self):
            self.t = 0
            return self.wrapped_env.rng.uniform(size=29)

        def step(self, action):
            self.t += 1
            done = self.t == 5 or action[0] > 0
            info = {"TimeLimit.truncated": not action[0] > 0} if self.t == 5 else {}
            return np.full(29, self.t), np.float32(self.t), done, info

        def get_dataset(self, h5path):
            return {"read": h5path}

    modules = {"gym": types.SimpleNamespace(make=Classic), "mjrl": types.ModuleType("mjrl")}
    modules["mjrl"].__spec__ = "found"
    modules["d4rl"] = types.SimpleNamespace(qlearning_dataset=lambda env, dataset: {"env": env.env_id, **dataset})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("fake_classic")
def test_classic_environments_get_gymnasiums_interface():
    import gymnasium

    env = make_env("antmaze-umaze-v0", backend="d4rl")
    assert isinstance(env, gymnasium.Env) and env.classic.env_id == "antmaze-umaze-v0"
    assert env.observation_space.shape == (29,) and env.action_space.shape == (8,)
    before = np.random.get_state()[1].copy()
    first, info = env.reset(seed=1)
    goal = env.classic.wrapped_env.goal
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # the user's global generator is unchanged
    env.reset(seed=2)
    assert info == {} and not np.array_equal(goal, env.classic.wrapped_env.goal)
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
    np.testing.assert_array_equal(env.classic.wrapped_env.goal, goal)
    stay, move = np.zeros(8), np.ones(8)
    assert [env.step(stay)[1:4] for _ in range(5)] == [(t, False, t == 5) for t in (1.0, 2.0, 3.0, 4.0, 5.0)]
    env.reset()
    assert env.step(move)[1:4] == (1.0, True, False)
    env.reset()
    assert [env.step(action)[2:4] for action in [stay] * 4 + [move]][-1] == (True, False)


@pytest.mark.usefixtures("fake_classic")
def test_classic_backend_reads_by_d4rl(tmp_path):
    path = tmp_path / "d.hdf5"
    assert load_dataset("pen-human-v1", path, "d4rl") == {"env": "pen-human-v1", "read": str(path)}
    assert load_dataset("halfcheetah-demo-v0", path, "d4rl")["env"] == "halfcheetah-medium-v2"
    assert load_dataset("halfcheetah-demo-v0", None, "d4rl")["read"] == str(DEMO_FILES / "halfcheetah-demo-v0.hdf5")
    for call in (load_dataset, make_env):
        bad_input(lambda call=call: call("maze-demo-v0", backend="d4rl"), "--env-backend d4rl", "maze-demo-v0")
