"""The arguments of a run: parsed from dql.py's command line, read back from a folder's args.json, and checked.

`Args` itself, its defaults and the paper's settings are in dql.py. Whatever is wrong raises BadInput, whose one line
says how to fix it.
"""

from __future__ import annotations

import io
import math
import os
import re
from contextlib import redirect_stderr
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import tyro

from d4rl_tasks import BadInput

if TYPE_CHECKING:
    from dql import Args

FREE = ("resume", "runs_dir", "device", "track", "capture_video", "compile", "cudagraphs")  # may change on resuming


def parse(kind: type, argv: list[str]) -> Args:
    """The command line of dql.py. Raises BadInput."""
    words = []  # tyro wants a value for what may be None: --compile becomes --compile True, --no-compile False
    for word, after in pairwise([*argv, "--"]):
        flag = word.replace("--no-", "--", 1)
        if flag in ("--compile", "--cudagraphs", "--max-q-backup") and after not in ("True", "False", "None"):
            words += [flag, str(flag == word)]
        else:
            words.append(word)
    return parsed(kind, words, "dql.py")


def parsed(kind: type, words: list[str], script: str, **options):
    """tyro.cli(kind) of words. Raises BadInput, with tyro's boxed complaint as one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(kind, args=words, prog=script, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(f"{as_line(complaint.getvalue())} (python {script} --help lists the flags)") from None


def as_line(complaint: str) -> str:
    """tyro's boxed complaint as one line, without its title and the flag's help."""
    text = re.sub(r"^\u256d.*$|[\u2500-\u257f]", " ", complaint, flags=re.M)
    return re.split(r"Got errors|Argument helptext|For full helptext", " ".join(text.split()))[0].strip()


def typed(args: Args) -> Args:
    """Makes Paths of strings that should be paths. Raises BadInput if a value is not of its field's type."""
    words = {f.name: getattr(args, f.name) for f in fields(args) if f.type in (Path, Path | None)}
    args = replace(args, **{name: Path(word) for name, word in words.items() if isinstance(word, str)})
    for f in fields(args):
        if not fits(getattr(args, f.name), f.type):
            raise BadInput(f"--{f.name.replace('_', '-')} cannot be {getattr(args, f.name)!r} (see --help)")
    return args


def check_ranges(args: Args) -> None:
    """Raises BadInput if a number is out of range, or does not go with another."""
    if args.eta == 0 and args.eval_candidates > 1:
        raise BadInput("--eta 0 trains no critics to choose by: leave out --eval-candidates, or give a small --eta")
    for names, good, wanted in (
        ("num_seeds num_updates batch_size num_steps average_every eval_every eval_episodes eval_candidates log_every "
         "checkpoint_every",
         lambda v: 1 <= v < 2**31, "at least 1 and below 2^31"),
        ("num_steps num_seeds", lambda v: v <= 10_000, "at most 10,000"),
        ("eta grad_norm average_from eval_temperature offline_rank",
         lambda v: 0 <= v < 1e18, "at least 0 and below 1e18"),
        ("seed", lambda v: 0 <= v < 2**31, "at least 0 and below 2^31"),
        ("learning_rate", lambda v: 0 < v < math.inf, "finite and above 0"),
        ("gamma tau average_decay", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ):  # fmt: skip
        for name in names.split():
            if not good(getattr(args, name)):
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be {wanted}")


def absolute(path: Path) -> Path:
    """The absolute path: a run may be resumed from another working directory."""
    return Path(os.path.abspath(os.path.expanduser(path)))


# ----------------------------------------------------------------------------- args.json


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a field's type: a class, a Literal, or a union."""
    if get_args(kind):
        return any(fits(value, one) for one in get_args(kind))
    if not isinstance(kind, type):
        return value == kind
    if kind is float and type(value) is int:  # JSON writes 1.0 as it likes
        return abs(value) < 2**63
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def resumed_args(given: Args, saved: Args) -> Args:
    """The arguments of the run to resume, perhaps with more updates. Raises BadInput if one outside FREE differs."""
    given = typed(given)
    group = given.resume.resolve().parent
    if given.resume.resolve().name.startswith("seed-") and (group / "args.json").exists():
        raise BadInput(f"{given.resume} is a part of the run {group}: resume that, or a copy of the part elsewhere")
    refuse_others(given, saved, [f.name for f in fields(given) if getattr(given, f.name) != f.default])
    free = {name: getattr(given, name) for name in (*FREE, "num_updates")}
    unsaid = {"device": "auto", "compile": None, "cudagraphs": None, "num_updates": None}
    args = replace(saved, **{k: v for k, v in free.items() if k not in unsaid or v != unsaid[k]})
    check_ranges(args)
    return args


def refuse_given(args: Args, saved: Args, argv: list[str]) -> None:
    """Raises BadInput if a flag outside FREE was given, even with its default value, and the run to resume differs."""
    words = [word.split("=")[0] for word in argv if word.startswith("--")]
    flags = {re.sub("^--(no-)?", "", word).replace("-", "_") for word in words}
    refuse_others(args, saved, [f.name for f in fields(args) if f.name in flags])


def refuse_others(given: Args, saved: Args, names: list[str]) -> None:
    """Raises BadInput if an argument of these names, outside FREE, differs from the run's; num_updates may grow."""
    given = replace(given, dataset_path=given.dataset_path and absolute(given.dataset_path))
    differ = [
        f"--{name.replace('_', '-')} {getattr(given, name)} (the run's: {getattr(saved, name)})"
        for name in names
        if name not in FREE
        and getattr(given, name) != getattr(saved, name)
        and not (name == "num_updates" and may_grow(saved.num_updates, given.num_updates, saved.lr_decay))
    ]
    if differ:
        flags = ", ".join(differ)
        but = " (updates may only grow in number, and not with --lr-decay)" * ("--num-updates" in flags)
        raise BadInput(f"a resumed run keeps its arguments; leave out {flags}{but}")


def may_grow(num_updates: object, more: object, lr_decay: bool) -> bool:
    """Whether a run may be extended to more updates: what it has done must not depend on where it was to end."""
    return type(num_updates) is type(more) is int and num_updates < more and not lr_decay
