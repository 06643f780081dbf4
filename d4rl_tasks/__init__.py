"""D4RL's tasks (Fu et al. 2020, arXiv 2004.07219) on maintained packages: data files, environments, reference scores.

The twenty tasks of the paper's Table 1 and halfcheetah-demo-v0. `load_dataset` returns the arrays of D4RL 1.1's
`qlearning_dataset`; `make_env` returns environments whose single steps equal those of gym, mujoco-py and d4rl.
Importing this package needs numpy alone; gymnasium, mujoco, h5py, pooch and the classic stack load when they are used.
"""

from d4rl_tasks.environments import make_env, make_envs, rendering_env, step_each
from d4rl_tasks.files import load_dataset
from d4rl_tasks.tasks import TASKS, BadInput, Task, normalized_score, reason, task_of

__all__ = [
    "TASKS", "BadInput", "Task", "load_dataset", "make_env", "make_envs", "normalized_score", "reason",
    "rendering_env", "step_each", "task_of",
]  # fmt: skip
