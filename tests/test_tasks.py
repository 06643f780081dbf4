"""Tests of the table of tasks, of scores, and of what the package needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_files import bad_input

from d4rl_tasks import TASKS, load_dataset, make_env, normalized_score

ROOT = Path(__file__).parents[1]


def test_tasks_are_those_that_d4rl_registers():
    registered = json.loads((ROOT / "reference" / "d4rl_tasks.json").read_text())
    assert set(TASKS) == {*registered, "halfcheetah-demo-v0", "maze-demo-v0"} and len(registered) == 20
    for env_id, theirs in registered.items():
        ours = TASKS[env_id]
        assert ours.family == env_id.split("-")[0]
        assert (ours.state_dim, ours.action_dim) == (theirs["obs_dim"], theirs["act_dim"])
        assert ours.max_episode_steps == theirs["max_episode_steps"]
        assert (ours.ref_min_score, ours.ref_max_score) == (theirs["ref_min_score"], theirs["ref_max_score"])
        assert ours.url == theirs["dataset_url"]


def test_known_hashes_belong_to_the_files_of_four_tasks():
    known = {env_id: task for env_id, task in TASKS.items() if task.sha256}
    assert set(known) == {
        "kitchen-complete-v0", "hopper-medium-replay-v2", "walker2d-medium-replay-v2", "hopper-medium-expert-v2"
    }  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{64}", task.sha256) for task in known.values())


def test_normalized_score():
    assert normalized_score("halfcheetah-medium-v2", 12135.0) == pytest.approx(100, abs=1e-12)
    assert normalized_score("halfcheetah-demo-v0", -280.178953) == 0
    assert normalized_score("kitchen-complete-v0", 2.0) == 50
    np.testing.assert_allclose(normalized_score("antmaze-umaze-v0", np.array([0.0, 0.25, 1.0])), [0, 25, 100])
    # D4RL's tables: a pen return of 3076.83 is the expert's, of 96.26 the random policy's
    np.testing.assert_allclose(normalized_score("pen-cloned-v1", np.array([96.262799, 3076.8331017826877])), [0, 100])


def test_unknown_ids_are_answered_with_all_ids_the_closest_first():
    for call in (load_dataset, make_env, lambda env_id: normalized_score(env_id, 0.0)):
        message = bad_input(lambda call=call: call("halfcheetah"), "'halfcheetah'", *TASKS)
        assert message.index("halfcheetah-medium-v2") < message.index("antmaze-umaze-v0")
    bad_input(lambda: make_env("zzz"), "zzz", *TASKS)
    bad_input(lambda: make_env("pen-human-v1", backend="gym"), "'gym'", "maintained", "d4rl")


def test_package_needs_numpy_alone():
    heavy = ["gymnasium", "gymnasium_robotics", "mujoco", "h5py", "torch", "tqdm", "pooch", "filelock", "gym", "d4rl"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); import d4rl_tasks; print(len(d4rl_tasks.TASKS))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "22"
