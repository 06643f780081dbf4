"""Makes the data of maze-demo-v0: random walks through the maze, in D4RL's HDF5 layout.

    python bench/make_maze_demo.py

At each crossing a walk takes one of the ways on, all equally likely, but never back. A simple controller with noise
follows it from turn to turn, and takes a uniformly random action in a quarter of the steps. Walks that take a shortest
way from start to goal are left out: such a way can only be put together from parts of others. Equal seeds write an
equal file. The committed file is this script's, which printed:

    the shortest way without noise: return -4.00
    500 episodes, return -27.2 +- 6.2, the best -6; normalized 10.7, the best 92.3; 23% arrive
    13,604 rows, 199,866 bytes
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import h5py
import numpy as np

from bench.make_demo import write
from d4rl_tasks import make_env, normalized_score
from d4rl_tasks.demo_maze import CELLS, CENTRE, REACH
from housekeeping import arguments, ending

ENV_ID = "maze-demo-v0"
Cell = tuple[int, int]  # (column, row)
FIRST, LAST = (tuple(np.argwhere(mark == CELLS)[0][::-1].tolist()) for mark in "SG")


@dataclass
class Args:
    """Makes the data of maze-demo-v0."""

    out: Path = Path("runs/maze-demo-v0.hdf5")
    """the file to write; the committed one is in demo/"""
    seed: int = 0
    """seed of the walks, of the environment and of the noise"""
    episodes: int = 500
    """episodes in all"""
    noise: float = 0.2
    """standard deviation of the noise on each action"""
    random: float = 0.25
    """share of steps with a uniformly random action instead: they show the critics what any action leads to"""


def ways_on(cell: Cell) -> list[Cell]:
    """The free cells beside a cell."""
    x, y = cell
    return [(i, j) for i, j in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)) if CELLS[j, i] != "#"]


def shortest_way() -> list[Cell]:
    """The cells from the start to the goal, by breadth-first search."""
    ways, edge = {FIRST: [FIRST]}, [FIRST]
    for cell in edge:
        for other in ways_on(cell):
            if other not in ways:
                ways[other] = [*ways[cell], other]
                edge.append(other)
    return ways[LAST]


def random_way(rng: np.random.Generator) -> list[Cell]:
    """The cells of a random walk from the start to the goal, or of its first 100."""
    way = [FIRST]
    while way[-1] != LAST and len(way) < 100:
        on = [cell for cell in ways_on(way[-1]) if cell not in way[-2:-1]]  # the maze has no dead end
        way.append(on[rng.integers(len(on))])
    return way


def follow(env: gymnasium.Env, way: list[Cell], noise: float, random: float, rng: np.random.Generator,
           seed: int) -> list[np.ndarray]:  # fmt: skip
    """One episode along the cells of a way: observations, actions, rewards, terminals, timeouts."""
    turns = [a[0] != b[0] and a[1] != b[1] for a, b in zip(way[:-2], way[2:], strict=True)]
    corners = [cell for cell, turn in zip(way[1:-1], turns, strict=True) if turn]
    places = np.array([*corners, way[-1]]) + 0.5 - CENTRE
    rows, (state, _), k, done = [], env.reset(seed=seed), 0, False
    while not done:
        while k < len(places) - 1 and np.abs(state - places[k]).max() < 0.45:
            k += 1
        move = (places[k] - state) / REACH
        action = np.clip(move + noise * rng.standard_normal(2), -1, 1)
        if rng.uniform() < random:
            action = rng.uniform(-1, 1, 2)
        action = action.astype(np.float32)
        next_state, reward, terminal, timeout, _ = env.step(action)
        rows.append((state, action, reward, terminal, timeout and not terminal))
        state, done = next_state, terminal or timeout
    return [np.array(column) for column in zip(*rows, strict=True)]


def main(args: Args) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    env, rng, shortest, ways = make_env(ENV_ID), np.random.default_rng(args.seed), shortest_way(), []
    best = np.mean([follow(env, shortest, 0.0, 0.0, rng, seed)[2].sum() for seed in range(100)])
    while len(ways) < args.episodes:
        way = random_way(rng)
        if len(way) > len(shortest):
            ways.append(way)
    seeds = 1000 * (args.seed + 1) + np.arange(len(ways))
    episodes = [
        follow(env, way, args.noise, args.random, rng, int(seed)) for way, seed in zip(ways, seeds, strict=True)
    ]
    returns = np.array([episode[2].sum() for episode in episodes])
    arrived = np.mean([episode[3][-1] for episode in episodes])
    lines = [
        f"the shortest way without noise: return {best:.2f}",
        f"{len(returns)} episodes, return {returns.mean():.1f} +- {returns.std():.1f}, the best {returns.max():.0f}; "
        f"normalized {normalized_score(ENV_ID, returns.mean()):.1f}, the best "
        f"{normalized_score(ENV_ID, returns.max()):.1f}; {100 * arrived:.0f}% arrive",
    ]
    attributes = {
        "made_by": "bench/make_maze_demo.py", "env_id": ENV_ID, "seed": args.seed, "noise": args.noise,
        "returns": "\n".join(lines), "versions": f"numpy {np.__version__}, h5py {h5py.__version__}", "licence": "MIT",
    }  # fmt: skip
    write(args.out, episodes, attributes)


if __name__ == "__main__":
    ending.run_main("make_maze_demo.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/make_maze_demo.py")))
