"""Tests of environments and data of one's own: gymnasium's, those of a user's module, and arrays."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import HOPPER, bad_input, rows_of, whole_life, write

import dql
from d4rl_tasks import TASKS, find_task, load_dataset, make_env, normalized_score, score_name

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("h5py")
torch.set_num_threads(1)

MODULE = '''
"""An environment of a user's own: states (2, 3), actions of odd bounds, which it insists on."""
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Own(gymnasium.Env):
    def __init__(self):
        self.observation_space = Box(-9, 9, (2, 3), np.float32)
        self.action_space = Box(np.array([-3.3, 0], "f4"), np.array([5.1, 0.7], "f4"))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.standard_normal((2, 3)).astype("f4"), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.np_random.standard_normal((2, 3)).astype("f4"), float(action[0]), False, False, {}

gymnasium.register("Own-v0", Own, max_episode_steps=5)
'''
LOW, HIGH = np.array([-3.3, 0], "f4"), np.array([5.1, 0.7], "f4")


@pytest.fixture
def own_id(tmp_path, monkeypatch):
    """The id of an environment in a module in the current folder; nothing has imported it yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_envs.py").write_text(MODULE)
    yield "own_envs:Own-v0"
    forget()


def write_minari(folder, rows):
    """One episode as Minari writes it: one observation more than actions."""
    import h5py

    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        file["episode_0/observations"] = rows["observations"]
        for name, key in (("actions", "actions"), ("rewards", "rewards"), ("terminals", "terminations")):
            file[f"episode_0/{key}"] = rows[name][1:]
    return folder


def forget():
    sys.modules.pop("own_envs", None)
    gymnasium.registry.pop("Own-v0", None)


def own_rows(n=12, low=LOW, high=HIGH, shape=(2, 3)):
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((n, *shape)).astype("f4"),
        "actions": rng.uniform(low, high, (n, len(low))).astype("f4"),
        "rewards": rng.standard_normal(n), "terminals": np.arange(n) == 7, "timeouts": np.arange(n) == 4,
    }  # fmt: skip


def pendulum_rows(n=30):
    return own_rows(n, np.array([-2.0]), np.array([2.0]), (3,))


def tiny(folder, **changes):
    return dql.Args(**{"device": "cpu", "runs_dir": folder / "runs", "num_updates": 4, "batch_size": 8, "num_steps": 2,
                       "eval_episodes": 2, "eval_candidates": 2, **changes})  # fmt: skip


def run(monkeypatch, capsys, *words):
    """What python dql.py with these words prints."""
    monkeypatch.setattr(sys, "argv", ["dql.py", *map(str, words)])
    dql.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Pendulum-v1", "a module", "Minari"])
def test_the_whole_life_of_a_run(kind, own_id, tmp_path, monkeypatch, capsys):
    if kind == "Minari":
        data = write_minari(tmp_path / "minari", pendulum_rows())
    else:
        data = write(tmp_path / "own.hdf5", own_rows() if kind == "a module" else pendulum_rows())
    env_id = own_id if kind == "a module" else "Pendulum-v1"
    words = ("--env-id", env_id, "--dataset-path", data)
    out = whole_life(lambda *words: run(monkeypatch, capsys, *words), tmp_path / "runs", *words)
    assert "4 updates, return:" in out
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["score_is"] == "return" and summary["paper"] is None and summary["args"]["gamma"] == 0.99


def test_a_module_s_environment_is_imported_for_who_names_it_but_not_for_a_file(own_id, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "own.hdf5", own_rows())
    words = ["--device", "cpu", "--num-updates", 4, "--batch-size", 8, "--eval-episodes", 2, "--eval-candidates", 2,
             "--runs-dir", tmp_path, "--dataset-path", data, "--score-range", -10, 10, "--num-seeds", 2]  # fmt: skip
    out = run(monkeypatch, capsys, "--env-id", own_id, *words)
    folder = Path(out.splitlines()[-1])
    assert "4 updates, normalized score (0 is a return of -10, 100 of 10):" in out and "own_envs" in sys.modules
    forget()
    for resumed in ([], ["--env-id", "Pendulum-v1"]):
        bad_input(lambda r=resumed: run(monkeypatch, capsys, "--resume", folder, "--num-updates", 6, *r), own_id)
    policy = dql.load_policy(folder / "seed-1", device="cpu")  # which needs no environment
    assert policy(np.zeros(6)).shape == (2,) and "own_envs" not in sys.modules
    states = torch.zeros(100, 6)
    assert ((policy(states) >= torch.tensor(LOW)) & (policy(states) <= torch.tensor(HIGH))).all()
    with pytest.raises(ValueError, match="6 numbers"):
        policy(np.zeros((2, 3)))
    out = run(monkeypatch, capsys, "--resume", folder, "--num-updates", 6, "--env-id", own_id)
    assert "6 updates, normalized score" in out and "own_envs" in sys.modules


def test_train_takes_arrays_and_a_function_that_makes_environments(own_id, tmp_path):
    sys.path.append(str(tmp_path))
    import own_envs

    def make():
        return gymnasium.wrappers.TimeLimit(own_envs.Own(), 3)

    rows = own_rows()
    data = {name: rows[name] for name in ("observations", "actions", "rewards", "terminals")}
    data["next_observations"] = torch.as_tensor(rows["observations"])  # anything that numpy takes
    args = tiny(tmp_path, env_id="mine/toy", hidden_dim=32, hidden_layers=2)
    summary = dql.train(args, data=data, make_env=make)
    folder = Path(summary["folder"])
    assert summary["env_id"] == "mine/toy" and summary["score_is"] == "return" and folder.name.startswith("mine-toy__")
    assert dql.load_policy(folder, device="cpu")(np.zeros((5, 6))).shape == (5, 2)
    more = dql.train(dql.Args(resume=folder, device="cpu", num_updates=6), data=data, make_env=make)
    assert more["num_updates"] == 6
    data["rewards"] = data["rewards"] + 1
    more = dql.Args(resume=folder, device="cpu", num_updates=8)
    bad_input(lambda: dql.train(more, data=data, make_env=make), "data are not those")
    bad_input(lambda: dql.train(more), "mine/toy")
    for known in (HOPPER, "cube-single-play-singletask-v0"):
        bad_input(lambda: dql.train(tiny(tmp_path, env_id=known), data=data, make_env=make), known, "another name")  # noqa: B023


def test_a_video_of_an_environment_of_one_s_own(own_id, tmp_path):
    pytest.importorskip("moviepy")
    sys.path.append(str(tmp_path))
    import own_envs

    class Drawn(own_envs.Own):
        def render(self):
            return np.zeros((64, 64, 3), np.uint8)

    def make(kind):
        return gymnasium.wrappers.TimeLimit(kind(), 3)

    args = tiny(tmp_path, env_id="mine", capture_video=True)
    folder = Path(dql.train(args, data=own_rows(), make_env=lambda: make(Drawn))["folder"])  # Own insists on its bounds
    assert (folder / "video.mp4").stat().st_size > 500
    bad_input(lambda: dql.train(args, data=own_rows(), make_env=lambda: make(own_envs.Own)), "--capture-video cannot")


def test_actions_are_scaled_and_states_flattened(own_id):
    task = find_task(own_id)
    rows = own_rows()
    data = load_dataset(task, rows)
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]  # 4 is cut off, and nothing follows 11
    low, high = LOW.astype(float), HIGH.astype(float)
    np.testing.assert_allclose(data["actions"], 2 * (rows["actions"][kept] - low) / (high - low) - 1, atol=1e-6)
    np.testing.assert_array_equal(data["observations"], rows["observations"].reshape(12, 6)[kept])
    np.testing.assert_array_equal(data["next_observations"], rows["observations"].reshape(12, 6)[np.add(kept, 1)])
    assert data["terminals"].tolist() == [k == 7 for k in kept]
    env = make_env(task)
    state, _ = env.reset(seed=0)
    assert state.shape == env.observation_space.shape == (6,) and env.action_space.shape == (2,)
    rewards = [env.step(np.full(2, a, "f4"))[1] for a in (-1, 0, 1)]  # Own pays its first action
    np.testing.assert_allclose(rewards, [-3.3, 0.9, 5.1], rtol=1e-6)
    assert normalized_score(task, -7.25) == -7.25 and normalized_score(find_task(own_id, score_range=(1, 3)), 2) == 50


def test_a_task_of_d4rl_takes_arrays_too(tmp_path):
    data = rows_of(20) | {"next_observations": rows_of(20, seed=1)["observations"]}
    loaded = load_dataset(find_task(HOPPER), data)
    np.testing.assert_array_equal(loaded["next_observations"], data["next_observations"])
    np.testing.assert_allclose(loaded["actions"], data["actions"], atol=1e-7)
    assert np.isfinite(dql.train(tiny(tmp_path, env_id=HOPPER), data=data)["last"]["score"])


def test_files_hold_next_observations_or_timeouts(own_id, tmp_path):
    task, rows = find_task(own_id), own_rows()
    after = own_rows()["observations"][::-1]
    shuffled = load_dataset(task, write(tmp_path / "a.hdf5", rows | {"next_observations": after}))
    np.testing.assert_array_equal(shuffled["next_observations"], after.reshape(12, 6))  # every row is a transition
    neither = {name: values for name, values in rows.items() if name != "timeouts"}
    bad_input(lambda: load_dataset(task, write(tmp_path / "b.hdf5", neither)), "neither next_observations nor timeouts")
    bad_input(lambda: load_dataset(task, neither), "data has neither")


def test_npz_of_ogbench_s_layout(own_id, tmp_path):
    task, rows, path = find_task(own_id), own_rows(), tmp_path / "d.npz"
    ends = np.isin(np.arange(12), [4, 11])  # the last rows of two episodes
    layout = {name: rows[name] for name in ("observations", "actions", "rewards")} | {"terminals": ends}
    np.savez(path, **layout, masks=(np.arange(12) != 3).astype("f4"))
    data = load_dataset(task, path)
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(data["rewards"], rows["rewards"][kept].astype("f4"))
    assert data["terminals"].tolist() == [k == 3 for k in kept]
    np.savez(path, **layout, masks=np.ones(12), next_observations=rows["observations"])
    assert len(load_dataset(task, path)["rewards"]) == 12
    np.savez(path, **layout)
    bad_input(lambda: load_dataset(task, path), "d.npz has neither masks", "nor timeouts")
    np.savez(path, **(layout | {"timeouts": ends}))  # D4RL's layout: terminals are terminal
    assert len(load_dataset(task, path)["rewards"]) == 10
    np.savez(path, **layout, masks=np.array([{}] * 12, object))  # which would be unpickled
    bad_input(lambda: load_dataset(task, path), "d.npz cannot be read as .npz")
    path.write_bytes(b"no zip")
    bad_input(lambda: load_dataset(task, path), "d.npz cannot be read as .npz")
    bad_input(lambda: load_dataset(task, tmp_path / "gone.npz"), "gone.npz does not exist")


def test_a_minari_folder_for_an_environment_of_one_s_own(own_id, tmp_path):
    write_minari(tmp_path, own_rows())
    data = load_dataset(find_task(own_id), tmp_path)
    assert data["next_observations"].shape == (11, 6) and np.abs(data["actions"]).max() <= 1


WRONG = {  # the change of a column, and words of the refusal
    "beyond": ({"actions": np.full((12, 2), [5.2, 0.1], "f4")}, ["actions lie in [5.2, 5.2]", "[-3.3, 5.1]"]),
    "below": ({"actions": np.full((12, 2), [0, -1.0], "f4")}, ["[-1, -1] in column 1", "[0, 0.7]", "own bounds"]),
    "wide": ({"actions": np.zeros((12, 3))}, ["actions have shape (12, 3) instead of (12, 2)"]),
    "states": ({"observations": np.zeros((12, 2, 4))}, ["observations have shape (12, 2, 4) instead of (12, 6)"]),
    "short": ({"rewards": np.zeros(11)}, ["rewards have 11 rows, observations 12"]),
    "nan": ({"rewards": np.full(12, np.nan)}, ["rewards of row 0 are not finite"]),
    "words": ({"rewards": np.array(["one"] * 12)}, ["not numbers"]),
    "scalar": ({"observations": np.float32(1)}, ["observations are no array"]),
    "all cut off": ({"timeouts": np.ones(12, bool)}, ["no transition"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_do_not_fit_are_refused(name, own_id):
    changes, words = WRONG[name]
    task = find_task(own_id)
    bad_input(lambda: load_dataset(task, own_rows() | changes), *words)


def test_missing_columns_and_missing_data(own_id, tmp_path):
    task = find_task(own_id)
    bad_input(lambda: load_dataset(task), own_id, "--dataset-path")
    bad_input(lambda: load_dataset(task, {"observations": np.zeros((3, 6))}), "no actions and no rewards", "timeouts")
    empty = {name: values[:0] for name, values in own_rows().items()} | {"next_observations": np.zeros((0, 6))}
    bad_input(lambda: load_dataset(task, empty), "no transition")
    rows = {name: values for name, values in own_rows().items() if name != "terminals"}
    bad_input(lambda: load_dataset(task, write(tmp_path / "d.hdf5", rows)), "d.hdf5", "no terminals")


def test_ids_and_environments_that_do_not_suit(own_id):
    bad_input(lambda: find_task("zzz"), *TASKS, "--dataset-path", "module:Env-v0")
    bad_input(lambda: find_task("no_such_module:Env-v0"), "no_such_module")
    bad_input(lambda: find_task("a:b:Env-v0"), "a:b:Env-v0")
    bad_input(lambda: find_task("Pendulum-v99"), "Pendulum-v99", "v1")
    bad_input(lambda: find_task("CartPole-v1"), "Discrete(2)", "continuous")
    bad_input(lambda: find_task("Blackjack-v1"), "not a Box")
    bad_input(lambda: find_task(own_id, "d4rl"), "D4RL's tasks only")
    bad_input(lambda: find_task(HOPPER, score_range=(0, 1)), "--score-range")

    def unbounded():
        return gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1"))

    bad_input(lambda: find_task("mine", make=unbounded), "must be finite")
    bad_input(lambda: dql.with_settings(dql.Args(score_range=(2.0, 1.0))), "--score-range", "below")
    bad_input(lambda: dql.with_settings(dql.Args(score_range=(1.0, 2.0, 3.0))), "--score-range")


def test_shuffled_rows_of_d4rl_are_refused(tmp_path):
    rows = rows_of(300) | {"timeouts": np.arange(300) % 100 == 99}
    rows["terminals"][50] = True
    after = np.roll(rows["observations"], -1, axis=0)
    ends = np.isin(np.arange(300), [50, 99, 199, 299])
    after[ends] = 7  # where an episode ends, nothing follows
    in_order = rows | {"next_observations": after}
    assert len(load_dataset(HOPPER, write(tmp_path / "d.hdf5", in_order))["rewards"]) == 297
    order = np.random.default_rng(0).permutation(300)
    shuffled = {name: values[order] for name, values in in_order.items()}
    bad_input(lambda: load_dataset(HOPPER, write(tmp_path / "d.hdf5", shuffled)), "next_observations", "in order")
    after[[20, 30]] += 1
    message = bad_input(lambda: load_dataset(HOPPER, write(tmp_path / "d.hdf5", in_order)), "of 2 rows", "row 20")
    assert "timeouts" in message and "leave out" in message
    published = write(tmp_path / TASKS[HOPPER].url.rsplit("/", 1)[1], in_order)
    assert len(load_dataset(HOPPER, published)["rewards"]) == 297  # one row in 100 may differ there
    write(published, shuffled)
    bad_input(lambda: load_dataset(HOPPER, published), "next_observations")


def test_scores_have_names():
    assert score_name(HOPPER) == score_name("Pendulum-v1", (0.0, 1.0)) == "normalized score"
    assert score_name("Pendulum-v1") == score_name("own:one-singletask-v0") == "return"
    assert score_name("scene-play-singletask-v0") == "success rate in %"


def test_width_and_number_of_hidden_layers():
    agent = dql.DiffusionQL(11, 3, dql.Args(env_id=HOPPER, device="cpu", hidden_dim=40, hidden_layers=4))
    for network, into, out in ((agent.critic.q1, 14, 1), (agent.policy.trunk.append(agent.policy.output), 30, 3)):
        shapes = [tuple(layer.weight.shape) for layer in network if isinstance(layer, torch.nn.Linear)]
        assert shapes == [(40, into), (40, 40), (40, 40), (40, 40), (out, 40)]
    bad_input(lambda: dql.with_settings(dql.Args(hidden_layers=0)), "--hidden-layers")
