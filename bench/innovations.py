"""Variants of Diffusion-QL on one data set, as innovations.md plans: trains what is missing, evaluates, makes a table.

    python bench/innovations.py kitchen                                # its four variants, five seeds each
    python bench/innovations.py kitchen --variants layernorm+decay --seeds 2 --only-table
    python bench/innovations.py cheetah --dataset-path FILE --batch-size 128    # other flags are passed on to dql.py

The jobs are those of table1.py: a process for each seed on a CPU and for all seeds on a GPU; killed and started again,
this goes on from the checkpoints in --out. The last policy of each finished run is evaluated from other starts, with
the run's number of candidates and with one. FOLDER/DATA.md, .json and .png show all finished runs with these settings.
"""

import json
import sys
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
from housekeeping.machine import choose_device
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
RESAMPLES = 10_000


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


def evaluate(folder: Path, wanted: dql.Args, candidates: int, may_run: bool) -> dict[int, float]:
    """The score of each seed's last policy from other starts; evaluated now, unless evaluations.jsonl has it."""
    path = folder / "evaluations.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        it = json.loads(line)
        asked = it["which"], it["episodes"], it["settings"]["eval_candidates"], it["settings"]["seed"]
        if asked == ("last", wanted.eval_episodes, candidates, evaluating.Evaluation.seed):
            return dict(zip(it["seeds"], it["scores"], strict=True))
    if not may_run:
        return {}
    words = ["--evaluate", str(folder), "--eval-candidates", str(candidates), "--device", wanted.device]
    print(evaluating.run(words, dql.read_args, dql.load_agent, dql.evaluate, dql.eval_noise_seed), flush=True)
    return evaluate(folder, wanted, candidates, False)


def difference(scores: list[float], published: list[float]) -> list[float] | None:
    """The 95 % bootstrap interval of the difference of two means over seeds; none with fewer than three seeds."""
    if min(len(scores), len(published)) < 3:
        return None
    rng = np.random.default_rng(0)
    means = [rng.choice(some, (RESAMPLES, len(some))).mean(1) for some in (scores, published)]
    return np.percentile(means[0] - means[1], [2.5, 97.5]).tolist()


def row_of(variant: str, runs: list[table1.Run], wanted: dql.Args, allowed: tuple, may_run: bool) -> tuple[dict, list]:
    """A variant's row of the table, and the metrics of its seeds. Raises BadInput."""
    own = {run.args.seed: run for run in runs if run.args.num_seeds == 1}  # of a seed that ran twice the last
    tops = [run for run in runs if not (run.folder.parent / "args.json").exists()]
    scores = [{}, {}]
    for found, candidates in zip(scores, (wanted.eval_candidates, 1), strict=True):
        for run in tops:
            found |= evaluate(run.folder, wanted, candidates, may_run)
    metrics = [read_metrics(own[seed].folder / "metrics.csv") for seed in sorted(own)]
    return {
        "variant": variant, "seeds": sorted(own),
        "candidates": [scores[0][seed] for seed in sorted(scores[0])],
        "one_candidate": [scores[1][seed] for seed in sorted(scores[1])],
        "diverge": sum(any(leaves_range(row["target_q"], allowed) for row in rows) for rows in metrics),
        "target_q": [rows[-1]["target_q"] for rows in metrics],
        "critic_loss": [rows[-1]["critic_loss"] for rows in metrics],
        "ms_per_update": float(np.median([1000 / row["updates_per_second"] for rows in metrics for row in rows]))
        / tops[-1].args.num_seeds,
    }, metrics  # fmt: skip


def mean_std(scores: list[float]) -> str:
    return f"{np.mean(scores):.1f}" + (f" ± {np.std(scores):.1f}" if len(scores) > 1 else "") if scores else ""


def markdown(rows: list[dict], wanted: dql.Args, allowed: tuple[float, float]) -> str:
    """The table, ± over seeds, of the finished seeds."""
    published = next((row for row in rows if row["variant"] == "published"), None)
    head = ["variant", "seeds", f"{wanted.eval_candidates} candidates", "one candidate",
            "difference from published, 95 %", "seeds that diverge", "last target Q", "ms an update"]  # fmt: skip
    table = [head, ["---"] * len(head)]
    for row in rows:
        apart = row["difference"]
        cost = f" ({row['ms_per_update'] / published['ms_per_update']:.2f} times)" if published else ""
        table.append([
            row["variant"], str(len(row["seeds"])), mean_std(row["candidates"]), mean_std(row["one_candidate"]),
            f"{apart[0]:.1f} to {apart[1]:.1f}" if apart else "", str(row["diverge"]),
            ", ".join(f"{q:.4g}" for q in row["target_q"]), f"{row['ms_per_update']:.2f}{cost}",
        ])  # fmt: skip
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return (f"{wanted.env_id}, {wanted.num_updates:,} updates: {score_name(wanted.env_id, wanted.score_range)} of the "
            f"last policy, {wanted.eval_episodes} episodes from other starts, mean ± std over seeds.\nRewards allow a "
            f"target Q from {allowed[0]:.4g} to {allowed[1]:.4g}.\n\n{lines}\n")  # fmt: skip


def run(argv: list[str]) -> int:
    """Does what the command line asks for; returns the exit code. Raises BadInput and Stopped."""
    args, more = arguments.parsed(Args, argv, "bench/innovations.py", return_unknown_args=True)
    if args.data not in DATA:
        raise BadInput(f"{args.data}: there is {', '.join(DATA)}")
    flags, seeds = DATA[args.data]
    devices, seeds = table1.choose_devices(args.devices), args.seeds or seeds
    chosen = {variant: flags_of(variant) for variant in args.variants}
    args.out.mkdir(parents=True, exist_ok=True)
    rows, groups, failed = [], {}, False
    for variant, its_flags in chosen.items():
        words = [*EVALUATIONS.split(), *flags.split(), *its_flags, *more]
        given = arguments.typed(arguments.parse(dql.Args, words))
        device = str(choose_device(devices[0]))
        wanted = dql.with_settings(replace(given, num_seeds=seeds, device=device, runs_dir=args.out / args.data))
        if not args.only_table:
            failed |= table1.train([wanted], words, devices)
        if not rows:
            reward = dql.make_batch(load_dataset(wanted.env_id, wanted.dataset_path), wanted.reward, "cpu").reward
            allowed = q_range(reward, wanted)
        same = [run for run in table1.read_runs(wanted.runs_dir)[0] if not table1.differing(run.args, wanted)]
        if finished := [run for run in same if run.summary]:
            row, groups[variant] = row_of(variant, finished, wanted, allowed, not args.only_table)
            rows.append(row)
        if unfinished := sorted({run.args.seed for run in same if not run.summary and run.args.num_seeds == 1}):
            print(f"{variant}: not finished, and left out: seed(s) {', '.join(map(str, unfinished))}", file=sys.stderr)
    if not rows:
        raise BadInput(f"{args.out / args.data} has no finished run with these settings")
    published = next((row["candidates"] for row in rows if row["variant"] == "published"), [])
    for row in rows:
        row["difference"] = difference(row["candidates"], published) if row["variant"] != "published" else None
    text, path = markdown(rows, wanted, allowed), args.out / f"{args.data}.md"
    write_whole(path, lambda beside: beside.write_text(text))
    write_json(path.with_suffix(".json"), {"rows": rows, "target_q_range": allowed})
    score = score_name(wanted.env_id, wanted.score_range)
    write_whole(path.with_suffix(".png"), partial(write_curves, groups=groups, title=wanted.env_id, score_name=score,
                                                  q_range=allowed))  # fmt: skip
    print(f"{text}\n{path.with_suffix('.png')}")
    return int(failed)


if __name__ == "__main__":
    ending.run_main("innovations.py", lambda: sys.exit(run(sys.argv[1:])))
