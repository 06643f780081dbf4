"""Tests of the environments: single steps of D4RL's own stack, starts, ends, many side by side."""

import functools
import os
import subprocess
import sys
import tempfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_files import bad_input

from d4rl_tasks import TASKS, make_env, make_envs, models, rendering_env, simulators, step_each

ROOT = Path(__file__).parents[1]
FAMILIES = ["halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-medium-play-v0", "pen-human-v1",
            "kitchen-mixed-v0"]  # fmt: skip


def classic_steps(file):
    """{task: {qpos, qvel, action, obs, next_obs, reward, done[, goal]}}, single steps of the classic stack."""
    steps = {}
    with np.load(ROOT / "reference" / file) as arrays:
        for key in arrays:
            task, name = key.split("/")
            steps.setdefault(task, {})[name] = arrays[key]
    return steps


CLASSIC = classic_steps("classic_steps.npz")
CONTACTS = classic_steps("classic_contacts.npz")  # an ant at a wall, and a pen at its target


def compare_steps(env_id, steps, rows):
    """Repeats these rows' steps of the classic stack in our environment; results must agree up to rounding."""
    env = make_env(env_id)
    raw = env.unwrapped
    for i in rows:
        env.reset(seed=0)
        raw.noise = 0.0  # kitchen's observation noise, which the classic steps lack
        if env_id.startswith("pen"):
            raw.set_target(steps["goal"][i])
        elif "goal" in steps:
            raw.goal = steps["goal"][i]
        raw.set_state(steps["qpos"][i], steps["qvel"][i])
        np.testing.assert_allclose(raw.observe(), steps["obs"][i], rtol=0, atol=1e-12, err_msg=str(i))
        observation, reward, terminated, truncated, _ = env.step(steps["action"][i])
        np.testing.assert_allclose(observation, steps["next_obs"][i], rtol=0, atol=1e-11, err_msg=str(i))
        assert reward == pytest.approx(steps["reward"][i], rel=0, abs=1e-11), i
        assert (terminated, truncated) == (steps["done"][i], False), i


@pytest.mark.parametrize("name", CLASSIC)
def test_single_steps_are_those_of_the_classic_stack(name):
    assert len(CLASSIC[name]["qpos"]) == 60
    compare_steps(name.removesuffix("-demo"), CLASSIC[name], range(60))


@pytest.mark.parametrize("env_id", CONTACTS)
def test_contacts_are_those_of_the_classic_stack(env_id):
    compare_steps(env_id, CONTACTS[env_id], range(20))


def test_the_tasks_of_gymnasium_are_others():
    """The comparison of single steps is sensitive: HalfCheetah-v5, same rules but other masses, is far off."""
    import gymnasium

    steps, env, off = CLASSIC["halfcheetah-medium-v2"], gymnasium.make("HalfCheetah-v5"), []
    for i in range(60):
        env.reset(seed=0)
        env.unwrapped.set_state(steps["qpos"][i], steps["qvel"][i])
        off.append(np.abs(env.step(steps["action"][i])[0] - steps["next_obs"][i]).max())
    assert np.median(off) > 0.05 and max(off) > 0.2


@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_steps_and_a_seed_begins_one_episode(env_id):
    import gymnasium

    task, env, other = TASKS[env_id], *make_envs(env_id, 2)
    assert isinstance(env, gymnasium.Env) and env.unwrapped.metadata["render_fps"] in (10, 12, 20, 50, 100, 125)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, task.action_dim)).astype(np.float32)

    def episode(env, seed):
        rows = [env.reset(seed=seed)[0]]
        for action in actions:
            observation, reward, terminated, truncated, info = env.step(action)
            assert type(reward) is float and type(terminated) is bool and type(truncated) is bool and info == {}
            rows.append(np.append(observation, reward))
        return np.concatenate(rows)

    first = episode(env, 3)
    assert env.observation_space.contains(env.reset()[0]) and env.observation_space.shape == (task.state_dim,)
    assert env.action_space.contains(actions[0])
    np.testing.assert_array_equal(episode(env, 3), first)
    np.testing.assert_array_equal(episode(other, 3), first)
    assert not np.array_equal(episode(other, 4), first)


@pytest.mark.parametrize("env_id", FAMILIES)
def test_environments_side_by_side_are_as_if_alone(env_id, monkeypatch):
    """Environments that share a model, in turns or in threads, step like environments with their own model."""
    n, steps, task = 4, 6, TASKS[env_id]
    actions = np.random.default_rng(1).uniform(-1, 1, (n, steps, task.action_dim)).astype(np.float32)

    def start(envs):
        return [env.reset(seed=seed)[0] for seed, env in enumerate(envs)]

    def alone(i, env):
        return [np.append(*env.step(action)[:2]) for action in actions[i]]

    envs = make_envs(env_id, n)
    assert len({id(env.unwrapped.model) for env in envs}) == 1 and len({id(env.unwrapped.data) for env in envs}) == n
    first = start(envs)
    in_turns = [[np.append(*env.step(actions[i][t])[:2]) for i, env in enumerate(envs)] for t in range(steps)]
    start(envs)
    with ThreadPoolExecutor(n) as pool:
        in_threads = list(pool.map(alone, range(n), envs))
    with monkeypatch.context() as patch:
        patch.setattr(simulators, "model_of", models.model_of.__wrapped__)  # without the cache, so each has its own
        own = make_envs(env_id, 2)
    assert own[0].unwrapped.model is not own[1].unwrapped.model
    np.testing.assert_array_equal(start(own), first[:2])
    for i, env in enumerate(own):
        expected = alone(i, env)
        np.testing.assert_array_equal([row[i] for row in in_turns], expected)
        np.testing.assert_array_equal(in_threads[i], expected)


@pytest.mark.parametrize("env_id", FAMILIES)
def test_actions_are_clipped_as_d4rl_clips_them(env_id):
    """An action beyond 1 has the effect, and the control cost, of the clipped action."""
    env, results = make_env(env_id), []
    for scale in (1, 7):
        env.reset(seed=0)
        action = scale * np.where(np.arange(TASKS[env_id].action_dim) % 2, 1, -1).astype(np.float32)
        results.append(env.step(action)[:2])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize(
    "env_id", ["halfcheetah-medium-v2", "antmaze-umaze-v0", "antmaze-large-play-v0", "kitchen-mixed-v0"]
)
def test_episodes_are_truncated_at_d4rls_length(env_id):
    env, task = make_env(env_id), TASKS[env_id]
    env.reset(seed=0)
    action = np.zeros(task.action_dim, np.float32)
    ends = [env.step(action)[2:4] for _ in range(task.max_episode_steps)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * (task.max_episode_steps - 1) + [True]


def test_pen_is_truncated_after_100_steps_and_ends_when_it_falls():
    env, rng = make_env("pen-human-v1"), np.random.default_rng(0)
    lengths = set()
    for seed in range(10):
        env.reset(seed=seed)
        for t in range(1, 101):
            action = rng.uniform(-1, 1, 24) if seed < 8 else np.zeros(24)
            observation, reward, terminated, truncated, _ = env.step(action)
            assert terminated == (observation[26] < 0.075)
            away, likeness = np.linalg.norm(observation[39:42]), observation[33:36] @ observation[36:39]
            assert reward == pytest.approx(
                likeness - away - 5 * terminated + (10 * (likeness > 0.9) + 50 * (likeness > 0.95)) * (away < 0.075)
            )
            if terminated or truncated:
                lengths.add((t, terminated))
                break
    assert (100, False) in lengths and any(terminated for _, terminated in lengths)


def test_first_states_are_drawn_as_d4rl_draws_them():
    for env_id, spread in (("halfcheetah-medium-v2", 0.1), ("hopper-medium-v2", 5e-3), ("walker2d-medium-v2", 5e-3)):
        env = make_env(env_id)
        model, data = env.unwrapped.model, env.unwrapped.data
        drawn = [(env.reset(seed=seed), data.qpos - model.qpos0, data.qvel + 0)[1:] for seed in range(300)]
        qpos, qvel = map(np.array, zip(*drawn, strict=True))
        assert 0.95 * spread < np.abs(qpos).max() <= spread and abs(qpos.std() / spread - 3**-0.5) < 0.03
        # HalfCheetah's velocities are normal, the others' uniform
        assert abs(qvel.std() / spread - (1 if spread == 0.1 else 3**-0.5)) < 0.05
    env = make_env("kitchen-complete-v0")
    seen, goal = np.split(np.array([env.reset(seed=seed)[0] for seed in range(200)]), 2, axis=1)
    first = simulators.KITCHEN_START.copy()
    first[26:] /= np.linalg.norm(first[26:])  # the kettle's quaternion, which d4rl's simulator normalizes
    robot, things = np.split(np.abs(seen - first), [9], axis=1)
    assert 0.0095 < robot.max() <= 0.01  # a tenth of franka_config.xml's 0.1
    np.testing.assert_array_less(things.max(axis=0), simulators.KITCHEN_NOISE[9:] + 1e-12)
    assert (things.max(axis=0) > 0.9 * simulators.KITCHEN_NOISE[9:]).all()
    assert (goal == goal[0]).all() and np.count_nonzero(goal[0]) == 9  # two of the kettle's seven numbers are 0


def test_pens_target_is_turned_as_in_the_classic_stack():
    """Turns are about x and y, by at most one radian; so are the classic stack's, whose quaternions have w z = x y."""
    env = make_env("pen-cloned-v1")
    turned = []
    for seed in range(300):
        observation = env.reset(seed=seed)[0]
        turned.append(observation[36:39])
    classic = CLASSIC["pen-human-v1"]["goal"]
    np.testing.assert_allclose(classic[:, 0] * classic[:, 3], classic[:, 1] * classic[:, 2], atol=1e-12)
    turned = np.array(turned)
    about_x, about_y = np.arctan2(-turned[:, 1], turned[:, 2]), np.arcsin(turned[:, 0])
    for angle in (about_x, about_y):
        assert -1 <= angle.min() < -0.97 and 0.97 < angle.max() <= 1 and abs(angle.std() - 3**-0.5) < 0.03


@pytest.mark.parametrize(
    ("maze", "corner"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))]  # the goal's cell, in metres
)
def test_antmaze_goals_and_starts(maze, corner):
    env = make_env(f"antmaze-{maze}-diverse-v0")
    raw, goals, places = env.unwrapped, [], []
    for seed in range(200):
        observation = env.reset(seed=seed)[0]
        assert np.linalg.norm(observation[3:7]) == pytest.approx(1, abs=1e-12)  # a quaternion that was drawn with noise
        places.append(observation[:2])
        goals.append(raw.goal)
    goals, places = np.array(goals), np.array(places)
    drawn = goals - corner  # the sum of draws from [0, 1] and [0, 0.5]
    assert drawn.min() >= 0 and drawn.max() <= 1.5 and abs(drawn.mean() - 0.75) < 0.05
    assert abs(drawn.std() - (1.25 / 12) ** 0.5) < 0.05
    assert np.abs(places).max() <= 0.1 and places.std() > 0.05
    env.reset()
    np.testing.assert_array_equal(raw.goal, goals[-1])  # without a seed the environment keeps its goal, as d4rl's does
    ends = set()
    for away in np.linspace(-0.6, 0.6, 41):
        env.reset(seed=0)
        raw.set_state(np.append(raw.goal - [away, 0], raw.data.qpos[2:]), np.zeros(14))
        observation, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
        reached = np.hypot(*(observation[:2] - raw.goal)) <= 0.5
        assert (reward, terminated) == (float(reached), reached)
        ends.add(terminated)
    assert ends == {False, True}


@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_antmaze_walls_leave_a_way_to_the_goal(maze):
    """The walls enclose the maze, and its goal can be reached from its start: a flood fill around the model's boxes."""
    import mujoco

    model = make_env(f"antmaze-{maze}-play-v0" if maze != "umaze" else "antmaze-umaze-v0").unwrapped.model
    boxes = model.geom_pos[model.geom_type == mujoco.mjtGeom.mjGEOM_BOX]
    walls = {tuple(cell) for cell in (boxes[:, :2] / 4).round().astype(int)}
    assert len(walls) == len(boxes) == {"umaze": 18, "medium": 38, "large": 62}[maze]
    reached, edge = {(0, 0)}, [(0, 0)]
    while edge:
        x, y = edge.pop()
        for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
            if cell not in walls | reached:
                reached.add(cell)
                edge.append(cell)
    goal = models.cells(maze, "G")[0]
    assert (goal[0] / 4, goal[1] / 4) in reached and len(reached) == {"umaze": 7, "medium": 26, "large": 46}[maze]


@pytest.mark.parametrize(("env_id", "fourth"), [("kitchen-partial-v0", [19]), ("kitchen-mixed-v0", [11, 12])])
def test_kitchen_pays_once_for_each_thing_and_ends_with_the_fourth(env_id, fourth):
    env = make_env(env_id)
    env.reset(seed=0)
    raw, rewards, ends = env.unwrapped, [], []
    qpos = raw.data.qpos.copy()
    for places in ([22], [17, 18], [], list(range(23, 30)), fourth):
        qpos[places] = raw.goal[places]
        raw.set_state(qpos, np.zeros(29))
        _, reward, terminated, _, _ = env.step(np.zeros(9, np.float32))
        rewards.append(reward)
        ends.append(terminated)
    assert rewards == [1, 1, 0, 1, 1] and ends == [False] * 4 + [True]
    env.reset()
    assert not env.step(np.zeros(9, np.float32))[2] and env.unwrapped.todo == set(raw.things)


def test_pictures_change_nothing():
    code = """
import numpy as np, d4rl_tasks
for env_id in ("hopper-medium-v2", "pen-human-v1"):
    ends = []
    for mode in ("rgb_array", None):
        env = d4rl_tasks.make_env(env_id, render_mode=mode)
        env.reset(seed=0)
        for t in range(3):
            observation = env.step(env.action_space.high / 2)[0]
            if mode and t == 1:
                picture = env.render()
                assert picture.shape == (480, 480, 3) and picture.std() > 5, (picture.shape, picture.std())
        ends.append(observation)
        env.close()
    assert np.array_equal(*ends)
print("drawn")"""
    for library in ("osmesa", "egl"):
        environment = {**os.environ, "MUJOCO_GL": library, "PYOPENGL_PLATFORM": library}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
        if "drawn" in run.stdout:
            return
        assert "AssertionError" not in run.stderr, run.stderr
    pytest.skip("no OpenGL library to draw with")


def test_packages_that_are_missing_or_do_not_fit_are_named(monkeypatch):
    import mujoco

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    for module in ("d4rl_tasks.models", "d4rl_tasks.simulators"):  # as before they were imported
        monkeypatch.delitem(sys.modules, module)
    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "__version__", "3.3.0")
        bad_input(lambda: make_env("hopper-medium-v2"), "mujoco 3.3.0", "pip install mujoco==3.2.6")
    for name in ("gymnasium", "mujoco", "gymnasium_robotics"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            bad_input(lambda: make_env("kitchen-mixed-v0"), name, "pip install -r requirements.txt")
    assert "MUJOCO_GL" not in os.environ  # which is set while mujoco is imported for the second time
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "moviepy", None)
        bad_input(lambda: rendering_env("hopper-medium-v2"), "moviepy", "pip install -r requirements.txt")


def test_simulators_need_no_opengl_and_videos_say_what_is_missing():
    """MUJOCO_GL names a library that is not there: in mujoco itself, importing it fails."""
    code = """
import sys, d4rl_tasks
sys.modules["mujoco." + sys.argv[1]] = None
env = d4rl_tasks.make_env("hopper-medium-v2")
env.reset(seed=0)
print(len(env.step([0.0, 0, 0])))
try:
    d4rl_tasks.rendering_env("hopper-medium-v2")
except d4rl_tasks.BadInput as error:
    print(error)"""
    for library in ("osmesa", "egl"):
        run = subprocess.run([sys.executable, "-c", code, library], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "MUJOCO_GL": library})  # fmt: skip
        steps, message = run.stdout.splitlines()
        assert steps == "5" and f"MUJOCO_GL={library}" in message and "libegl1" in message and not run.stderr


def test_no_temporary_folder_is_needed(monkeypatch):
    def none():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    models.model_of.cache_clear()
    for env_id in FAMILIES:
        make_env(env_id).reset(seed=0)


@pytest.mark.parametrize("env_id", FAMILIES)
def test_environments_stepped_at_once_are_those_stepped_in_turn(env_id, monkeypatch):
    n, task = 7, TASKS[env_id]
    actions = np.random.default_rng(1).uniform(-1, 1, (5, n, task.action_dim)).astype(np.float32)
    results = []
    for cores in (1, 2, 16):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        envs, ran = make_envs(env_id, n), set()
        for seed, env in enumerate(envs):
            env.reset(seed=seed)
            env.unwrapped.judge = functools.partial(judge_and_tell, env.unwrapped.judge, ran)
        results.append([step_each(envs, row) for row in actions])
        assert (len(ran) > 1) == (cores > 1 and not env_id.startswith("halfcheetah"))
    for at_once in results[1:]:
        for row, expected in zip(at_once, results[0], strict=True):
            for (observation, *rest), (wanted, *others) in zip(row, expected, strict=True):
                np.testing.assert_array_equal(observation, wanted)
                assert rest == others


def judge_and_tell(judge, ran, *args):
    ran.add(threading.get_ident())
    return judge(*args)


def test_stepping_at_once_passes_errors_on():
    envs = make_envs("pen-human-v1", 4)
    for env in envs:
        env.reset(seed=0)
    envs[3].unwrapped.observe = None
    with pytest.raises(TypeError):
        step_each(envs, np.zeros((4, 24), np.float32))
    assert step_each([], np.zeros((0, 24), np.float32)) == []
    assert step_each([types.SimpleNamespace(step=abs)] * 3, np.array([1, -2, 3])) == [1, 2, 3]  # of any kind
