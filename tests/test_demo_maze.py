"""Tests of the first demo: its environment, its data, and the two scores of reference."""

import h5py
import numpy as np
import pytest
from data_files import bad_input

import dql
from bench import make_maze_demo
from d4rl_tasks import TASKS, find_task, load_dataset, make_env, make_envs, normalized_score
from d4rl_tasks.demo_maze import CELLS, REACH, centre_of, content
from d4rl_tasks.files import DEMO_FILES

MAZE = "maze-demo-v0"
START, GOAL = centre_of("S"), centre_of("G")
FILE = DEMO_FILES / f"{MAZE}.hdf5"


def columns():
    with h5py.File(FILE) as file:
        return {name: file[name][...] for name in file}


def test_the_seed_determines_the_start_and_environments_are_independent():
    one, other = make_envs(MAZE, 2)
    first = one.reset(seed=3)[0]
    np.testing.assert_array_equal(other.reset(seed=3)[0], first)
    assert first.shape == (2,) and np.abs(first - START).max() <= 0.3
    one.step(np.ones(2))
    np.testing.assert_array_equal(other.unwrapped.place, first)
    assert (other.reset(seed=4)[0] != first).any() and (other.reset()[0] != other.reset()[0]).any()
    np.testing.assert_array_equal(one.reset(seed=3)[0], first)


def test_a_move_has_its_length_and_walls_stop_it():
    env = make_env(MAZE)
    env.reset(seed=0)
    raw = env.unwrapped
    for thrust, moved in ((0.5, 0.5 * REACH), (9.0, REACH)):  # an action is clipped to 1
        raw.place = START.copy()
        np.testing.assert_allclose(env.step(np.array([thrust, 0.0]))[0], START + np.array([moved, 0]), atol=1e-12)
    raw.place = START + np.array([-4, 0])
    x, y = env.step(np.array([-1.0, 0.2]))[0]  # the wall on the left stops x alone
    assert -4.5 <= x < -4.4 and y == pytest.approx(START[1] + 0.2 * REACH)
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert content(env.step(rng.uniform(-1, 1, 2))[0]) != "#"
    assert (CELLS[[0, -1]] == "#").all() and (CELLS[:, [0, -1]] == "#").all()


def test_each_step_costs_one_until_the_goal_or_the_time_limit():
    env = make_env(MAZE)
    env.reset(seed=0)
    limit = TASKS[MAZE].max_episode_steps
    steps = [env.step(np.zeros(2))[1:4] for _ in range(limit)]
    assert steps == [(-1.0, False, k == limit) for k in range(1, limit + 1)]
    assert normalized_score(MAZE, -float(limit)) == 0
    env.reset(seed=0)
    env.unwrapped.place = GOAL + np.array([0, 0.6])  # just below the goal's cell
    assert env.step(np.zeros(2))[1:4] == (-1.0, False, False)
    assert env.step(np.array([0, -0.2 / REACH]))[1:4] == (-1.0, True, False)


def test_every_row_of_the_data_is_a_step_of_the_environment():
    data, env = columns(), make_env(MAZE)
    ends = data["terminals"] | data["timeouts"]
    env.reset(seed=0)
    for k in np.random.default_rng(0).choice(len(ends), 500, replace=False):
        env.reset()
        env.unwrapped.place = data["observations"][k].astype(np.float64)
        place, reward, terminal, _, _ = env.step(data["actions"][k])
        assert (reward, terminal) == (data["rewards"][k], data["terminals"][k])
        if not ends[k]:  # at the edge of a wall, rounding to float32 may change one part of the move
            np.testing.assert_allclose(place, data["observations"][k + 1], atol=REACH / 20 + 1e-5)
    assert ends[-1] and np.diff(np.flatnonzero(np.append(True, ends))).max() == TASKS[MAZE].max_episode_steps
    assert not (data["terminals"] & data["timeouts"]).any() and FILE.stat().st_size < 300_000


def test_the_demo_is_a_task_like_others():
    data, rows = load_dataset(MAZE), columns()
    assert len(data["rewards"]) == (~rows["timeouts"][:-1]).sum() > 10_000  # the last row has no successor
    task = find_task(MAZE)
    np.testing.assert_array_equal(task.load(None)["actions"], data["actions"])
    assert task.make(None).reset(seed=1)[0].shape == (task.state_dim,)
    for call in (find_task, lambda env_id, backend: make_env(env_id, backend)):
        bad_input(lambda call=call: call(MAZE, "d4rl"), "--env-backend d4rl", MAZE)


def test_the_shortest_way_scores_100_and_no_episode_of_the_data_takes_it():
    env, rng, way = make_env(MAZE), np.random.default_rng(0), make_maze_demo.shortest_way()
    returns = [make_maze_demo.follow(env, way, 0.0, 0.0, rng, seed)[2].sum() for seed in range(20)]
    assert normalized_score(MAZE, np.mean(returns)) == pytest.approx(100)
    rows = columns()
    lengths = np.diff(np.flatnonzero(np.append(True, rows["terminals"] | rows["timeouts"])))
    assert normalized_score(MAZE, -lengths.min()) < 97 and normalized_score(MAZE, -lengths.mean()) < 20


def test_equal_seeds_write_an_equal_file(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_maze_demo.main(make_maze_demo.Args(out=tmp_path / name, seed=seed, episodes=10))
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_pictures_need_no_opengl():
    env = make_env(MAZE, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(np.ones(2))
    assert first.shape == (440, 440, 3) and first.dtype == np.uint8 and (env.render() != first).any()


def test_a_run_without_flags_is_of_this_maze(tmp_path):
    args = dql.Args(num_updates=2, batch_size=8, eval_episodes=2, eval_candidates=2, device="cpu", runs_dir=tmp_path)
    summary = dql.train(args)
    assert summary["env_id"] == MAZE and summary["score_range"] == (-30, -4) and summary["args"]["eta"] == 2.0
