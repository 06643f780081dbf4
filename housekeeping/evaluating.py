"""`python dql.py --evaluate RUN`: a run's policies evaluated anew, in the run's environments."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from d4rl_tasks import BadInput, find_task, make_envs, normalized_score, rendering_env, score_name
from housekeeping.acting import as_policy, film
from housekeeping.arguments import SIDE_BY_SIDE, Args, check_ranges, check_trust, parse, typed
from housekeeping.folder import seed_runs
from housekeeping.machine import choose_device, versions

CHOICE = ("eval_candidates", "eval_temperature", "eval_average")


@dataclass
class Evaluation:
    """Evaluates the policies of a run, finished or not, anew. Flags of acting left at None take the run's value."""

    evaluate: Path
    """folder of the run, or of one of its seeds"""
    which: Literal["last", "best", "offline"] = "last"
    """policies of the last checkpoint, or of the evaluations that the run reports as best or offline"""
    eval_episodes: int | None = None
    """episodes of each seed's policy"""
    eval_candidates: int | None = None
    """actions sampled per state, of which one is chosen by Q"""
    eval_temperature: float | None = None
    """temperature of that choice; 0 takes the best"""
    eval_average: bool | None = None
    """act with the policy's average, or --no-eval-average"""
    seed: int = 10_000
    """episode k resets with seed + 100 + k, noise begins with the seed: as in the run's evaluations of that seed, whose
    scores selected the policies; the default takes others"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one"""
    env_id: str | None = None
    """the run's own: to be given only where that is code of a module"""
    capture_video: bool = False
    """write a video of one episode, video-WHICH.mp4, beside each policy"""


def run(argv: list[str], read_args: Callable, load_agent: Callable, evaluate: Callable, noise_seed: Callable) -> str:
    """Evaluates as a command line says, and appends one line to the run's evaluations.jsonl; returns what to print.

    The functions are dql.py's: read_args, load_agent, evaluate and eval_noise_seed. Raises BadInput.
    """
    given = typed(parse(Evaluation, argv, "dql.py --evaluate RUN"))
    folder, saved = given.evaluate, read_args(given.evaluate)
    args = settings(given, saved)
    acting = {name: getattr(args, name) for name in CHOICE}
    device = choose_device(args.device)
    task = find_task(args.env_id, args.env_backend, args.score_range)
    seeds = args.seed + 100 + np.arange(args.eval_episodes)
    rounds = np.split(seeds, -(-args.eval_episodes // SIDE_BY_SIDE))
    video_env = rendering_env(task) if given.capture_video else None
    envs, agent_seeds, steps, scores, policies = make_envs(task, len(rounds[0])), [], [], [], {}
    for path, own in seed_runs(saved, folder):
        agent, kept = load_agent(path, args.device, given.which, **acting)
        if task.widths != (agent.state_dim, agent.action_dim):
            raise BadInput(f"{args.env_id} has states and actions of {task.widths} numbers, the policy in {path} of "
                           f"{agent.state_dim, agent.action_dim}: it is another environment")  # fmt: skip
        generator = torch.Generator(device).manual_seed(noise_seed(args.seed, kept["step"]))
        act = partial(agent.act_fresh, generator=generator)
        returns = np.concatenate([evaluate(act, envs, some, device) for some in rounds])
        agent_seeds, steps = [*agent_seeds, own.seed], [*steps, kept["step"]]
        scores.append(normalized_score(task, returns))
        policies[path / f"video-{given.which}.mp4"] = as_policy(act, *task.widths, device, kept.get("action_bounds"))
    entry = {
        "which": given.which, "seeds": agent_seeds, "steps": steps, "episodes": args.eval_episodes,
        "score_is": score_name(args.env_id, args.score_range), **summary(np.array(scores)),
        "settings": acting | {"seed": args.seed, "env_id": args.env_id, "env_backend": args.env_backend},
        "versions": versions(device),
    }  # fmt: skip
    path = folder / "evaluations.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    if video_env:  # last: a film that fails must not cost the scores
        print(text(entry))
        for video, policy in policies.items():
            film(policy, video_env, int(seeds[0]), video)
        return "\n".join(map(str, (*policies, path)))
    return f"{text(entry)}\n{path}"


def settings(given: Evaluation, saved: Args) -> Args:
    """The run's arguments with what was given. Raises BadInput."""
    check_trust(given.env_id, saved.env_id, given.evaluate)
    if given.env_id not in (None, saved.env_id):
        raise BadInput(f"--env-id {given.env_id} is not the environment of {given.evaluate}, {saved.env_id}")
    changed = {name: getattr(given, name) for name in (*CHOICE, "eval_episodes", "seed", "device")}
    args = replace(saved, num_seeds=1, **{name: value for name, value in changed.items() if value is not None})
    check_ranges(args)
    return args


def summary(scores: np.ndarray) -> dict:
    """Of scores (K, E), of E episodes with each of K policies: means and spreads, and an interval of the mean.

    The interval is over policies; of a single one it is over episodes, and of a single episode there is none.
    """
    means = scores.mean(1)
    samples = means if len(means) > 1 else scores[0]
    interval = None
    if (n := len(samples)) > 1:
        half = t_quantile(n - 1) * samples.std(ddof=1) / math.sqrt(n)
        interval = [float(means.mean() - half), float(means.mean() + half)]
    return {"scores": means.tolist(), "stds": scores.std(1).tolist(), "mean": float(means.mean()),
            "std": float(samples.std()), "interval": interval}  # fmt: skip


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.001: exact for few degrees of freedom, then Cornish and Fisher's."""
    few = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    if df <= len(few):
        return few[df - 1]
    z = 1.959964
    return (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))  # fmt: skip


def text(entry: dict) -> str:
    """What is printed of a line of evaluations.jsonl."""
    episodes = f"{entry['episodes']} episode{'s' if entry['episodes'] > 1 else ''}"
    lines = [f"{entry['settings']['env_id']}, {entry['which']}, {episodes} of each seed, {entry['score_is']}:"]
    for seed, step, score, std in zip(*(entry[k] for k in ("seeds", "steps", "scores", "stds")), strict=True):
        lines.append(f"  {f'seed {seed}':8} {score:6.1f} ± {std:.1f} (update {step})")
    of = f"{len(entry['seeds'])} seeds" if len(entry["seeds"]) > 1 else episodes
    interval = ""
    if entry["interval"]:
        interval = "; 95 % interval of the mean {:.1f} to {:.1f} (t)".format(*entry["interval"])
    return "\n".join([*lines, f"  {'mean':8} {entry['mean']:6.1f} ± {entry['std']:.1f} ({of}){interval}"])
