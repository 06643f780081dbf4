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


def whole_life(run, folder, *words):
    """A run as its user sees it: trained, continued, evaluated, loaded and exported; returns what training printed.

    run(*words) is `python dql.py` with these words.
    """
    import torch

    import dql

    env_id = words[words.index("--env-id") + 1]
    out = run(*words, "--device", "cpu", "--num-updates", 4, "--batch-size", 8, "--eval-episodes", 2,
              "--eval-candidates", 2, "--runs-dir", folder, "--run-name", "run")  # fmt: skip
    folder = folder / "run"
    assert out.endswith(f"\n{folder}\n") and "4 updates, " in out
    assert "6 updates, " in run("--resume", folder, "--env-id", env_id, "--num-updates", 6, "--device", "cpu")
    again = run("--evaluate", folder, "--env-id", env_id, "--which", "best", "--eval-episodes", 3, "--device", "cpu")
    assert f"{env_id}, best, 3 episodes of each seed, " in again and (folder / "evaluations.jsonl").exists()
    agent, kept = dql.load_agent(folder, "cpu", "best")
    states, draws = torch.randn(5, agent.state_dim), agent.draw_act(5, torch.Generator().manual_seed(3))
    actions = dql.load_policy(folder, "best", 3, "cpu")(states)
    dql.export_policy(folder, folder / "policy.pt2", "best")
    exported = torch.export.load(folder / "policy.pt2").module()
    noise = draws.noise.view(len(draws.noise), *draws.gumbel.shape, -1)
    torch.testing.assert_close(exported(states, noise, draws.gumbel), actions, rtol=1e-6, atol=1e-6)
    low, high = kept["action_bounds"]
    assert ((low <= actions) & (actions <= high)).all() and actions.shape == (5, len(low))
    return out
