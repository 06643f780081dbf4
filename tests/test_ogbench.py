"""Tests of OGBench's single tasks; those that need its package are skipped where it is missing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import bad_input, whole_life

import dql
from d4rl_tasks import find_task, load_dataset, make_env, normalized_score, reference_gamma

ROOT = Path(__file__).parents[1]
CUBE = "cube-single-play-singletask-v0"
needs_ogbench = pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="ogbench is not installed")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cube():
    return find_task(CUBE)


@pytest.fixture
def small(cube, tmp_path):
    """A file in OGBench's layout of two episodes of 11 rows, of random actions; in three rows the cube is in place."""
    env, rng, rows = cube.make().unwrapped, np.random.default_rng(0), []
    for episode in range(2):
        state, info = env.reset(seed=episode)
        for k in range(11):
            action = rng.uniform(-1, 1, 5)
            qpos = info["qpos"].copy()
            if k in (3, 7) or (episode, k) == (1, 10):
                qpos[14:17] = env._data.mocap_pos[0] + 0.01
            rows.append({"observations": state, "actions": action, "terminals": k == 10, "qpos": qpos})
            state, _, _, _, info = env.step(action)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    for name in ("cube-single-play-v0.npz", "cube-single-play-v0-val.npz"):
        np.savez(tmp_path / name, **columns)
    return tmp_path / "cube-single-play-v0.npz"


@needs_ogbench
def test_data_are_those_of_ogbench_s_own_loader(cube, small, monkeypatch):
    import ogbench

    _, theirs, _ = ogbench.make_env_and_datasets(CUBE, dataset_path=str(small))
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(small.parent))
    for data in (load_dataset(cube, small), load_dataset(cube)):
        for name in ("observations", "actions", "next_observations", "rewards"):
            np.testing.assert_allclose(data[name], theirs[name], atol=1e-7)
        assert (data["terminals"] == (theirs["masks"] == 0)).all() and data["rewards"].dtype == np.float32
    assert np.flatnonzero(data["terminals"]).tolist() == [3, 7, 13, 17]  # the last rows have no action
    assert set(data["rewards"].tolist()) == {-1, 0} and len(data["rewards"]) == 20


@needs_ogbench
def test_a_score_is_the_rate_of_episodes_that_end_in_success(cube):
    env = make_env(cube)
    assert env.observation_space.shape == (28,) and env.spec.max_episode_steps == 200
    env.reset(seed=0)
    assert env.step(np.zeros(5))[1:4] == (0.0, False, False)  # OGBench's own reward is -1
    inner = env.unwrapped
    inner._data.joint("object_joint_0").qpos[:3] = inner._data.mocap_pos[0]
    steps = [env.step(np.zeros(5)) for _ in range(2)]
    assert steps[-1][1:3] == (1.0, True) and steps[-1][4]["success"]
    assert normalized_score(cube, np.array([0.0, 1.0])).tolist() == [0, 100]


@needs_ogbench
@pytest.mark.parametrize("env_id", ["pointmaze-teleport-navigate-singletask-v0", "puzzle-3x3-play-singletask-task2-v0"])
def test_a_reset_with_a_seed_begins_the_same_episode(env_id):
    """Also where another environment is stepped in between: OGBench's mazes share a generator."""
    env, other = (make_env(find_task(env_id)) for _ in range(2))
    before, episodes = np.random.get_state()[1].tolist(), []
    for seed in (3, 4, 3):
        states = [env.reset(seed=seed)[0]]
        other.reset(seed=seed + 1)
        for k in range(5):
            states.append(env.step(np.full(env.action_space.shape, 0.1 * k))[0])
            other.step(np.zeros(env.action_space.shape))
        episodes.append(np.array(states))
    assert (episodes[0] == episodes[2]).all() and (episodes[0] != episodes[1]).any()
    assert np.random.get_state()[1].tolist() == before


@needs_ogbench
def test_the_whole_life_of_a_run(small, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dql.py", *map(str, words)])
        dql.main()
        return capsys.readouterr().out

    words = ("--env-id", CUBE, "--dataset-path", small, "--hidden-layers", 2)
    assert "4 updates, success rate in %:" in whole_life(run, tmp_path / "runs", *words)
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["score_is"] == "success rate in %"


@needs_ogbench
def test_files_and_ids_that_do_not_fit(cube, small, tmp_path, monkeypatch):
    bad_input(lambda: find_task("cube-nine-play-singletask-v0"), "cube-nine", "no such task")
    bad_input(lambda: find_task("visual-cube-single-play-singletask-v0"), "images")
    bad_input(lambda: find_task(CUBE, score_range=(0, 1)), "--score-range")
    bad_input(lambda: load_dataset(find_task("pointmaze-medium-navigate-singletask-v0"), small), "28 numbers", "has 2")
    bad_input(lambda: load_dataset(cube, tmp_path / "gone.npz"), "gone.npz does not exist")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    bad_input(lambda: load_dataset(cube, tmp_path / "bad.npz"), "bad.npz is not OGBench's")
    columns = dict(np.load(small))
    for changes, words in (
        ({"qpos": None}, ["qpos"]),
        ({"actions": None}, ["actions"]),
        ({"qpos": columns["qpos"][:, :3]}, ["bad.npz is not OGBench's"]),
        ({"actions": columns["actions"] * 3}, ["actions lie in", "[-1, 1]"]),
        ({"observations": columns["observations"] * np.nan}, ["not finite"]),
    ):
        changed = {name: values for name, values in (columns | changes).items() if values is not None}
        np.savez(tmp_path / "bad.npz", **changed)
        bad_input(lambda: load_dataset(cube, tmp_path / "bad.npz"), *words)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "empty"))
    far = cube._replace(url="http://127.0.0.1:9/cube-single-play-v0.npz")
    from d4rl_tasks import ogbench_tasks

    bad_input(lambda: ogbench_tasks.data_file(far), "cube-single-play-v0.npz", "--dataset-path", "empty")


@needs_ogbench
def test_simulations_need_no_opengl():
    code = f"import d4rl_tasks; d4rl_tasks.make_env(d4rl_tasks.find_task({CUBE!r})).reset(seed=0); print('fine')"
    environ = os.environ | {"MUJOCO_GL": "osmesa", "LD_LIBRARY_PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr[-2000:]


def test_discounts_are_those_of_the_published_runs():
    table = {"cube-double-play": 0.99, "antmaze-large-navigate": 0.99, "antmaze-giant-navigate": 0.995,
             "humanoidmaze-medium-navigate": 0.995, "antsoccer-arena-navigate": 0.995}  # fmt: skip
    for words, gamma in table.items():
        assert reference_gamma(f"{words}-singletask-v0") == gamma
        assert dql.with_settings(dql.Args(env_id=f"{words}-singletask-task2-v0")).gamma == gamma
    assert dql.with_settings(dql.Args()).gamma == reference_gamma("Giant-v0") == 0.99
    assert dql.with_settings(dql.Args(env_id=CUBE, gamma=0.9)).gamma == 0.9


def test_a_missing_package_is_told_in_one_line():
    code = f"""
import sys
sys.modules["ogbench"] = None
import d4rl_tasks
try:
    d4rl_tasks.find_task({CUBE!r})
except d4rl_tasks.BadInput as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("pip install ogbench==1.2.2 dm_control==1.0.26\n") and done.stdout.count("\n") == 1
