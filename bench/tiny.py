"""Random data in D4RL's layout for tests and torture: runs on Hopper, which soon falls, take a second or two."""

from pathlib import Path

import numpy as np

from d4rl_tasks import TASKS

ENV_ID = "hopper-medium-v2"


def write_data(path: Path, rows: int = 600) -> Path:
    """Writes the data file, unless it is there, and returns its path."""
    import h5py

    task, rng = TASKS[ENV_ID], np.random.default_rng(0)
    if not path.exists():
        with h5py.File(path, "w") as file:
            file["observations"] = rng.standard_normal((rows, task.state_dim)).astype(np.float32)
            file["actions"] = np.tanh(rng.standard_normal((rows, task.action_dim))).astype(np.float32)
            file["rewards"] = rng.standard_normal(rows).astype(np.float32)
            file["terminals"] = rng.uniform(size=rows) < 0.05
            file["timeouts"] = np.zeros(rows, bool)
    return path
