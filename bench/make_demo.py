"""Makes the data of halfcheetah-demo-v0: a moderately good policy with much action noise, in D4RL's HDF5 layout.

    pip install -r requirements.txt stable-baselines3==2.9.2
    python bench/make_demo.py

A small SAC agent trains for 60,000 steps; without noise its mean actions score 39.2 (return 4,587). The data are these
mean actions plus normal noise, whose standard deviation is fixed within an episode: so the data's mean return is far
below that of the policy without noise. Behaviour cloning repeats much of the noise; Q-learning can tell it from what is
worth repeating. On the same machine the script writes the same file again. The committed file was made in this way,
with --agent so that SAC was trained only once; it printed:

    SAC after 60,000 steps (1699 s)
    noise 0.3: 8 episodes, return 3794.4 +- 148.6, normalized 32.8
    noise 0.9: 8 episodes, return 1116.5 +- 610.7, normalized 11.2
    noise 1.2: 8 episodes, return 416.4 +- 386.8, normalized 5.6
    noise 1.5: 8 episodes, return 341.3 +- 235.3, normalized 5.0
    noise 1.8: 8 episodes, return -71.8 +- 187.8, normalized 1.7
    all: 40 episodes, return 1119.4 +- 1435.9, normalized 11.3
    40,000 rows, 3,097,928 bytes
"""

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import h5py
import mujoco
import numpy as np
import torch

from d4rl_tasks import BadInput, make_env, normalized_score
from housekeeping import arguments, ending
from housekeeping.folder import write_whole

try:
    import stable_baselines3
    from stable_baselines3 import SAC
except ImportError:
    stable_baselines3 = None


@dataclass
class Args:
    """Makes the data of halfcheetah-demo-v0."""

    env_id: str = "halfcheetah-demo-v0"
    """the task whose environment is used"""
    out: Path = Path("runs/halfcheetah-demo-v0.hdf5")
    """the file to write; the committed one is in demo/"""
    seed: int = 1
    """seed of SAC, of the environments and of the noise"""
    total_steps: int = 60_000
    """SAC's training steps"""
    agent: Path | None = None
    """zip file of the trained SAC: read if it exists, otherwise written after training"""
    episodes: int = 40
    """episodes in all, shared evenly between the noise levels"""
    noise: tuple[float, ...] = (0.3, 0.9, 1.2, 1.5, 1.8)
    """standard deviations of the noise: one per episode, in turn"""


def train_sac(args: Args) -> "SAC":
    policy_kwargs = {"net_arch": [128, 128], "optimizer_kwargs": {"fused": True}}
    model = SAC("MlpPolicy", make_env(args.env_id), learning_rate=1e-3, learning_starts=1000, ent_coef="auto_0.1",
                seed=args.seed, policy_kwargs=policy_kwargs, device="cpu")  # fmt: skip
    return model.learn(args.total_steps)


def rollout(model: "SAC", env: gymnasium.Env, noise: float, seed: int) -> list[np.ndarray]:
    """One episode: observations, actions, rewards, terminals, timeouts."""
    rng = np.random.default_rng(seed)
    rows, (obs, _), done = [], env.reset(seed=seed), False
    while not done:
        mean = model.predict(obs, deterministic=True)[0]
        action = np.clip(mean + noise * rng.standard_normal(mean.shape), -1, 1).astype(np.float32)
        next_obs, reward, terminal, timeout, _ = env.step(action)
        rows.append((obs, action, reward, terminal, timeout))
        obs, done = next_obs, terminal or timeout
    return [np.array(column) for column in zip(*rows, strict=True)]


def write(path: Path, episodes: list[list[np.ndarray]], attributes: dict) -> None:
    """Writes the rows of episodes. h5py stores no times, so equal data give an equal file."""
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    data = {name: np.concatenate(column) for name, column in zip(names, zip(*episodes, strict=True), strict=True)}

    def write_beside(beside: Path) -> None:
        with h5py.File(beside, "w") as f:
            for name, value in data.items():
                value = value if value.dtype == bool else value.astype(np.float32)
                f.create_dataset(name, data=value, chunks=value.shape, compression="gzip", compression_opts=9,
                                 shuffle=True)  # fmt: skip
            f.attrs.update(attributes)

    write_whole(path, write_beside)
    print(attributes["returns"])
    print(f"{len(data['rewards']):,} rows, {path.stat().st_size:,} bytes")


def main(args: Args) -> None:
    if stable_baselines3 is None:
        raise BadInput("stable-baselines3 is not installed: pip install stable-baselines3==2.9.2")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start, env = time.time(), make_env(args.env_id)
    kept = args.agent is not None and args.agent.exists()
    model = SAC.load(args.agent, device="cpu") if kept else train_sac(args)
    if args.agent and not kept:
        model.save(args.agent)
    print(f"SAC after {model.num_timesteps:,} steps ({time.time() - start:.0f} s)", flush=True)

    levels = np.resize(args.noise, args.episodes)
    episodes = [rollout(model, env, level, 1000 * (args.seed + 1) + i) for i, level in enumerate(levels)]
    returns, lines = np.array([episode[2].sum() for episode in episodes]), []
    groups = {f"noise {level}": levels == level for level in dict.fromkeys(levels)} | {"all": levels >= 0}
    for name, chosen in groups.items():
        mean, std = returns[chosen].mean(), returns[chosen].std()
        score = normalized_score(args.env_id, mean)
        lines += [f"{name}: {chosen.sum()} episodes, return {mean:.1f} +- {std:.1f}, normalized {score:.1f}"]

    modules = (torch, stable_baselines3, gymnasium, mujoco, np, h5py)
    versions = [f"{module.__name__} {module.__version__}" for module in modules]
    attributes = {
        "made_by": f"bench/make_demo.py: noise on the mean actions of SAC after {model.num_timesteps} steps",
        "env_id": args.env_id, "seed": args.seed, "noise": args.noise, "returns": "\n".join(lines),
        "versions": ", ".join([f"python {platform.python_version()}", *versions]), "licence": "MIT",
    }  # fmt: skip
    write(args.out, episodes, attributes)


if __name__ == "__main__":
    ending.run_main("make_demo.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/make_demo.py")))
