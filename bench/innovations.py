"""Variants of Diffusion-QL on one data set, as innovations.md plans: trains what is missing, evaluates, makes a table.

    python bench/innovations.py kitchen                                # its four variants, five seeds each
    python bench/innovations.py kitchen --variants layernorm+decay --seeds 2 --only-table
    python bench/innovations.py cheetah --dataset-path FILE --batch-size 128    # other flags are passed on to dql.py

The jobs are those of table1.py: a process for each seed on a CPU and for all seeds on a GPU; killed and started again,
this goes on from the checkpoints in --out. The last policy of each finished seed is evaluated from other starts, with
the run's number of candidates and with one. OUT/DATA.md, .json and .png show the finished seeds with these settings.
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import table1
import tyro

import dql
from d4rl_tasks import BadInput, load_dataset, score_name
from housekeeping import arguments, ending, evaluating
from housekeeping.curves import read_metrics, write_curves
from housekeeping.folder import write_json, write_whole
from housekeeping.report import leaves_range, q_range

DATA = {  # flags, number of seeds
    "kitchen": ("--env-id kitchen-complete-v0 --num-updates 250000", 5),
    "cheetah": ("--env-id halfcheetah-medium-v2 --num-updates 160000", 3),
    "cube": ("--env-id cube-single-play-singletask-v0 --num-updates 250000 --eta 0.2 --hidden-dim 512 "
             "--hidden-layers 4", 3),
}  # fmt: skip
VARIANTS = {
    "published": "",
    "layernorm": "--critic-layernorm",
    "ensemble": "--num-critics 5 --pessimism 1",
    "decay": "--lr-decay",
    "one-step": "--one-step-gradient",
}
EVALUATIONS = "--eval-every 50000 --eval-episodes 100"
RESAMPLES = 10_000  # of the bootstrap


@dataclass
class Args:
    """Variants of Diffusion-QL on one data set. Other flags are passed on to dql.py, for all variants."""

    data: tyro.conf.Positional[str]
    """kitchen, cheetah or cube"""
    variants: list[str] = field(default_factory=lambda: ["published", "layernorm", "ensemble", "layernorm+decay"])
    """published, layernorm, ensemble, decay, one-step, or several of these joined by +"""
    seeds: int | None = None
    """how many seeds of each variant, from seed 0 on; otherwise the plan's number"""
    out: Path = Path("runs/innovations")
    """folder for the runs and the tables"""
    devices: list[str] = field(default_factory=list)
    """one for each job at a time: cuda:0 cuda:1 ..., or cpu cpu ... Default: every GPU or, without one, cpu per core"""
    only_table: bool = False
    """train and evaluate nothing, only make the table"""


def flags_of(variant: str) -> list[str]:
    """The flags of dql.py for a variant, or for several joined by +. Raises BadInput."""
    if unknown := set(variant.split("+")) - VARIANTS.keys():
        raise BadInput(f"--variants {', '.join(sorted(unknown))}: there are {', '.join(VARIANTS)}")
    return [flag for one in variant.split("+") for flag in VARIANTS[one].split()]


def score_of(folder: Path, wanted: dql.Args, candidates: int, may_run: bool) -> float | None:
    """The score of a seed's last policy from other starts: evaluated now, unless evaluations.jsonl has it."""
    names = (*evaluating.CHOICE, "env_id", "env_backend")
    settings = {name: getattr(wanted, name) for name in names}
    settings |= {"eval_candidates": candidates, "seed": evaluating.Evaluation.seed}
    path = folder / "evaluations.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, LookupError, TypeError):  # of a line that a full disk cut off
            it = json.loads(line)
            same = it["which"] == "last" and it["steps"] == [wanted.num_updates] and it["settings"] == settings
            if same and it["episodes"] == wanted.eval_episodes:
                return it["mean"]
    if not may_run:
        return None
    words = ["--evaluate", str(folder), "--eval-candidates", str(candidates), "--device", wanted.device]
    print(evaluating.run(words, dql.read_args, dql.load_agent, dql.evaluate, dql.eval_noise_seed), flush=True)
    return score_of(folder, wanted, candidates, False)


def difference(scores: list[float], published: list[float]) -> list[float]:
    """The 95 % bootstrap interval of the difference of two means over seeds."""
    rng = np.random.default_rng(0)
    means = [rng.choice(some, (RESAMPLES, len(some))).mean(1) for some in (scores, published)]
    return np.percentile(means[0] - means[1], [2.5, 97.5]).tolist()


def row_of(runs: list[table1.Run], wanted: dql.Args, allowed: tuple[float, float], may_run: bool) -> dict:
    """What a table's row says of a variant's finished seeds; "metrics" are their rows of metrics.csv. Raises BadInput.

    A seed without an evaluation, which only --only-table leaves, has the score None.
    """
    metrics = [read_metrics(run.folder / "metrics.csv") for run in runs]
    times = []  # milliseconds of an update of one agent
    for run, rows in zip(runs, metrics, strict=True):
        above = run.folder.parent
        agents = dql.read_args(above).num_seeds if (above / "args.json").exists() else 1
        times += [1000 / row["updates_per_second"] / agents for row in rows]
    return {
        "seeds": [run.args.seed for run in runs],
        "candidates": [score_of(run.folder, wanted, wanted.eval_candidates, may_run) for run in runs],
        "one_candidate": [score_of(run.folder, wanted, 1, may_run) for run in runs],
        "diverge": [any(leaves_range(row["target_q"], allowed) for row in rows) for rows in metrics],
        "target_q": [rows[-1]["target_q"] for rows in metrics],
        "critic_loss": [rows[-1]["critic_loss"] for rows in metrics],
        "ms_per_update": float(np.median(times)),
        "commits": sorted({str(run.summary["commit"]) for run in runs}),
        "devices": sorted({run.summary["device"] for run in runs}),
        "metrics": metrics,
    }  # fmt: skip


def mean_std(scores: list[float | None]) -> str:
    if None in scores:
        return "not evaluated"
    return f"{np.mean(scores):.1f}" + (f" ± {np.std(scores):.1f}" if len(scores) > 1 else "")


def markdown(rows: dict[str, dict], wanted: dql.Args, allowed: tuple[float, float], more: list[str]) -> str:
    """The table of the variants' rows: ± is over seeds."""
    head = ["variant", "seeds", f"{wanted.eval_candidates} candidates", "one candidate",
            "difference from published, 95 %", "seeds that diverge", "target Q at the end", "critics' loss",
            "ms an update"]  # fmt: skip
    table = [head, ["---"] * len(head)]
    for name, row in rows.items():
        apart, ms = row["difference"], row["ms_per_update"]
        cost = f" ({ms / rows['published']['ms_per_update']:.2f} times)" if "published" in rows else ""
        table.append([
            name, f"{len(row['seeds'])} of {wanted.num_seeds}", mean_std(row["candidates"]),
            mean_std(row["one_candidate"]), f"{apart[0]:.1f} to {apart[1]:.1f}" if apart else "",
            f"{sum(row['diverge'])}", *(", ".join(f"{x:.4g}" for x in row[key]) for key in ("target_q", "critic_loss")),
            f"{ms:.2f}{cost}",
        ])  # fmt: skip
    commits, devices = ({one for row in rows.values() for one in row[key]} for key in ("commits", "devices"))
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    score = score_name(wanted.env_id, wanted.score_range)
    return (f"{wanted.env_id}, {wanted.num_updates:,} updates: {score} of the last policy, {wanted.eval_episodes} "
            f"episodes from other starts, mean ± std over seeds.\nRewards allow a target Q from {allowed[0]:.4g} to "
            f"{allowed[1]:.4g}. Flags for all: {' '.join(more) or 'none'}. Commits: {', '.join(sorted(commits))}. "
            f"Devices: {', '.join(sorted(devices))}.\n\n{lines}\n")  # fmt: skip


def run(argv: list[str]) -> int:
    """Does what the command line asks for; returns the exit code. Raises BadInput and Stopped."""
    args, more = arguments.parsed(Args, argv, "bench/innovations.py", return_unknown_args=True)
    if args.data not in DATA:
        raise BadInput(f"{args.data}: there is {', '.join(DATA)}")
    flags, seeds = DATA[args.data]
    devices, words_of = table1.choose_devices(args.devices), {variant: flags_of(variant) for variant in args.variants}
    table1.passed_on(more)
    args.out.mkdir(parents=True, exist_ok=True)
    rows, allowed, failed = {}, None, False
    for variant, own in words_of.items():
        words = [*EVALUATIONS.split(), *flags.split(), *own, *more]
        given = arguments.typed(arguments.parse(dql.Args, words))
        wanted = dql.with_settings(replace(
            given, num_seeds=seeds if args.seeds is None else args.seeds, device=devices[0],
            runs_dir=args.out / args.data,
        ))  # fmt: skip
        if not args.only_table:
            failed |= table1.train([wanted], words, devices)
        if not allowed:
            reward = dql.make_batch(load_dataset(wanted.env_id, wanted.dataset_path), wanted.reward, "cpu").reward
            allowed = q_range(reward, wanted)
        runs, skipped = table1.read_runs(wanted.runs_dir)
        finished = [run for run in runs if run.summary and run.args.num_seeds == 1]
        by_seed = {run.args.seed: run for run in finished if not table1.differing(run.args, wanted)}  # the newest
        if some := [by_seed[seed] for seed in sorted(by_seed.keys() & table1.seeds_of(wanted))]:
            rows[variant] = row_of(some, wanted, allowed, not args.only_table)
    if skipped:
        print(f"skipped: {len(skipped)} run(s) with damaged or foreign JSON: {skipped[0]} ...", file=sys.stderr)
    if not rows:
        raise BadInput(f"{args.out / args.data} has no finished run with these settings")
    groups = {variant: row.pop("metrics") for variant, row in rows.items()}
    published = rows.get("published", {}).get("candidates", [])
    for variant, row in rows.items():  # a seed that is missing may have failed: then nothing is claimed
        whole = all(len(some) == wanted.num_seeds > 1 and None not in some for some in (row["candidates"], published))
        row["difference"] = difference(row["candidates"], published) if whole and variant != "published" else None
    text, path = markdown(rows, wanted, allowed, more), args.out / f"{args.data}.md"
    write_whole(path, lambda beside: beside.write_text(text))
    write_json(path.with_suffix(".json"), {"flags": more, "target_q_range": allowed, "rows": rows})
    score = score_name(wanted.env_id, wanted.score_range)
    write_whole(path.with_suffix(".png"), partial(write_curves, groups=groups, title=wanted.env_id, score_name=score,
                                                  q_range=allowed))  # fmt: skip
    print(f"{text}\n{path.with_suffix('.png')}")
    return int(failed)


if __name__ == "__main__":
    ending.run_main("innovations.py", lambda: sys.exit(run(sys.argv[1:])))
