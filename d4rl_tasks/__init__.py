"""D4RL's tasks (Fu et al. 2020, arXiv 2004.07219) on maintained packages: data files, environments, reference scores.

`find_task` finds other tasks too: OGBench's, and environments and data of one's own.
The twenty tasks of the paper's Table 1 and two demos. `load_dataset` returns the arrays of D4RL 1.1's
`qlearning_dataset`; `make_env` returns environments whose single steps equal those of gym, mujoco-py and d4rl.
Importing this package needs numpy alone; gymnasium, mujoco, h5py, pooch and the classic stack load when they are used.
"""

from d4rl_tasks.environments import make_env, make_envs, rendering_env, step_each
from d4rl_tasks.files import is_published, load_dataset
from d4rl_tasks.other_tasks import find_task
from d4rl_tasks.tasks import (
    TASKS,
    BadInput,
    Task,
    normalized_score,
    reason,
    reference_gamma,
    score_name,
    score_range,
    task_of,
    to_bounds,
)  # fmt: skip

__all__ = [
    "TASKS", "BadInput", "Task", "find_task", "is_published", "load_dataset", "make_env", "make_envs",
    "normalized_score", "reason", "reference_gamma", "rendering_env", "score_name", "score_range", "step_each",
    "task_of", "to_bounds",
]  # fmt: skip
