"""Draws the paths of maze-demo-v0: of the data, of cloning, and of Diffusion-QL.

    python dql.py && python dql.py --eta 0
    python bench/maze_picture.py --cloning runs/FOLDER --diffusion-ql runs/FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np

import dql
from d4rl_tasks import BadInput, make_envs, normalized_score
from d4rl_tasks.demo_maze import CELLS, CENTRE, centre_of, move
from d4rl_tasks.files import DEMO_FILES
from housekeeping import arguments, ending
from housekeeping.folder import write_whole

ENV_ID = "maze-demo-v0"


@dataclass
class Args:
    """Draws the paths of the data and of two runs, and prints their mean scores."""

    cloning: Path | None = None
    """folder of a run with --eta 0"""
    diffusion_ql: Path | None = None
    """folder of a run with the default eta"""
    episodes: int = 20
    """episodes per panel"""
    out: Path = Path("runs/maze-paths.png")
    """the picture to write"""


def paths_of_data(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The places and the actions, each (steps, 2), of n episodes, evenly spaced in the file."""
    with h5py.File(DEMO_FILES / f"{ENV_ID}.hdf5") as file:
        places, actions, *ends = (file[name][...] for name in ("observations", "actions", "terminals", "timeouts"))
    after = np.flatnonzero(ends[0] | ends[1])[:-1] + 1
    episodes = list(zip(np.split(places, after), np.split(actions, after), strict=True))
    return [episodes[k] for k in np.linspace(0, len(episodes) - 1, n).astype(int)]


def paths_of_run(folder: Path, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of n episodes of a run's policy, from starts that no evaluation of that run had."""
    policy, paths = dql.load_policy(folder, device="cpu"), []
    for k, env in enumerate(make_envs(ENV_ID, n)):
        (place, _), ended, places, actions = env.reset(seed=10_000 + k), False, [], []
        while not ended:
            places.append(place)
            actions.append(policy(place))
            place, _, terminated, truncated, _ = env.step(actions[-1])
            ended = terminated or truncated
        paths.append((np.array(places), np.array(actions)))
    return paths


def main(args: Args) -> None:
    if not (args.cloning and args.diffusion_ql):
        raise BadInput("give the folders of two runs: --cloning and --diffusion-ql")
    from matplotlib.figure import Figure

    runs = {"cloning": args.cloning, "Diffusion-QL": args.diffusion_ql}
    panels = {"data": paths_of_data(args.episodes)}
    panels |= {name: paths_of_run(folder, args.episodes) for name, folder in runs.items()}
    figure = Figure((10.5, 3.8), layout="constrained")
    for axes, (name, paths) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        score = np.mean([normalized_score(ENV_ID, -len(actions)) for _, actions in paths])
        print(f"{name}: {len(paths)} episodes, normalized score {score:.1f}")
        right, down = CENTRE
        colours = np.full((*CELLS.shape, 3), 255)
        colours[CELLS == "#"], colours[CELLS == "G"] = 150, (150, 220, 150)
        axes.imshow(colours, extent=(-right, right, down, -down))
        for path in paths:  # with the places within each step, for the point slides along walls
            line = np.concatenate([move(place, action) for place, action in zip(*path, strict=True)])
            axes.plot(*line.T, linewidth=1, alpha=0.5)
        axes.plot(*centre_of("S"), "ko")
        axes.set(title=f"{name}, {len(paths)} episodes", xticks=[], yticks=[])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, lambda beside: figure.savefig(beside, dpi=100, format="png"))


if __name__ == "__main__":
    ending.run_main("maze_picture.py", lambda: main(arguments.parsed(Args, sys.argv[1:], "bench/maze_picture.py")))
