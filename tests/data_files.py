"""Data files for the tests, and what should be read from them."""

import numpy as np
import pytest

from d4rl_tasks import BadInput

HOPPER = "hopper-medium-v2"  # 11 numbers of state, 3 of action, episodes of 1000 steps


def bad_input(call, *words):
    """call() must raise BadInput with a one-line message that has all these words; returns the message."""
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message, message
    return message


def rows_of(n, seed=0, state_dim=11, action_dim=3):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, state_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": np.zeros(n, bool),
    }


def write(path, columns, **options):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, **options)
    return path


def plain_loop(columns, limit):
    """The oracle: the transitions that D4RL 1.1 keeps, chosen row by row."""
    kept, count = [], 0
    for i in range(len(columns["rewards"]) - 1):
        final = bool(columns["timeouts"][i]) if "timeouts" in columns else count == limit - 1
        if final:
            count = 0
            continue
        if columns["terminals"][i]:
            count = 0
        kept.append(i)
        count += 1
    kept = np.array(kept, int)
    return {
        "observations": columns["observations"][kept].astype(np.float32),
        "actions": columns["actions"][kept].astype(np.float32),
        "next_observations": columns["observations"][kept + 1].astype(np.float32),
        "rewards": columns["rewards"].reshape(-1)[kept].astype(np.float32),
        "terminals": columns["terminals"].reshape(-1)[kept].astype(bool),
    }


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype and ours[name].shape == values.shape, name
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
