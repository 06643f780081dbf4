"""The arguments of a run: parsed from a command line, read back from a folder's args.json, and checked.

The dataclass itself, its defaults and the paper's settings are in dql.py. Whatever is wrong raises BadInput, whose one
line says how to mend it.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from d4rl_tasks import BadInput

Args = Any  # dql.py's dataclass: nothing here imports dql.py

# What may change when a run is resumed. The data may have been moved: a checksum tells whether they are the same.
FREE = ("resume", "runs_dir", "dataset_path", "device", "track", "capture_video", "compile", "cudagraphs")
SHORT = {"--lr": "--learning-rate"}
VARIANTS = ("critic_layernorm", "num_critics", "pessimism", "one_step_gradient")
SIDE_BY_SIDE = 100  # the most episodes of one seed that an evaluation steps at once


def parse(kind: type, argv: list[str], script: str = "dql.py") -> Args:
    """The dataclass kind with the values of a command line. Raises BadInput."""
    words, rest = [], list(argv)
    switches = {flag(f.name): f.type for f in fields(kind) if f.type in (bool, bool | None)}
    while rest:
        name, value = split(rest.pop(0))
        if name in switches and value is None and rest and rest[0].lower() in ("true", "false", "none"):
            value = rest.pop(0)
        if name in switches and value is not None:
            value = value.capitalize()
        if switches.get(name) is bool and value in ("True", "False"):  # as sweeps write it
            words.append(name if value == "True" else name.replace("--", "--no-", 1))
        elif value is not None:
            words.append(f"{name}={value}")
        elif switches.get(name) == bool | None:  # tyro wants a value for what may be None
            words.append(f"{name}=True")
        elif switches.get(positive := name.replace("--no-", "--", 1)) == bool | None:
            words.append(f"{positive}=False")
        else:
            words.append(name)
    return parsed(kind, words, script)


def split(word: str) -> tuple[str, str | None]:
    """A flag, with - for _ and its long name, and the value after "="; another word as it is."""
    if not word.startswith("--"):
        return word, None
    name, equals, value = word.partition("=")
    name = name.replace("_", "-")
    return SHORT.get(name, name), value if equals else None


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
    """tyro's boxed complaint as one line, without its title and the flag's help; of similar flags the first."""
    text = " ".join(re.sub(r"^\u256d.*$|[\u2500-\u257f]", " ", complaint, flags=re.M).split())
    says = re.split("Got errors|Argument helptext|For full helptext|Perhaps you|Arguments similar", text)[0].strip()
    for jargon in (r"no type matching \{None\}\|\{?(.*?)\}? could be instantiated from \[(.*)\]\.",
                   r"invalid literal for (int)\(\) with base 10: (.*)", r"could not convert string to (float): (.*)"):
        if wrong := re.fullmatch(rf"Error parsing (--\S+): {jargon}", says):
            says = f"{wrong[1]} takes {wrong[2].lower()}, not {wrong[3]}"
    similar = re.search(r"(?:Perhaps you meant|Arguments similar to \S+): (--[\w-]+)", text)
    return f"{says}: did you mean {similar[1]}?" if similar else says


def typed(args: Args) -> Args:
    """Makes Paths of what should be paths, the data's absolute, for a run may be resumed from another folder.

    Raises BadInput if a value is not of its field's type.
    """
    for f in fields(args):
        name, value = f.name, getattr(args, f.name)
        if f.type in (Path, Path | None) and isinstance(value, (str, Path)):
            value = Path(value).expanduser()
            value = Path(os.path.abspath(value)) if name == "dataset_path" else value
            args = replace(args, **{name: value})
            if any("\ud800" <= character <= "\udfff" for character in str(value)):
                raise BadInput(f"{flag(name)} {str(value)!r} is not UTF-8, the only names that TensorBoard takes")
        if not fits(value, f.type):
            raise BadInput(f"{flag(name)} cannot be {value!r} (see --help)")
    return args


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a field's type: a class, a Literal, or a union."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if get_args(kind):
        return any(fits(value, one) for one in get_args(kind))
    if not isinstance(kind, type):
        return value == kind
    if kind is float and type(value) is int:  # JSON writes 1.0 as it likes
        return abs(value) < 2**63
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def variants(args: Args) -> str:
    """The flags of the variants that args switch on, "" if none."""
    return ", ".join(flag(f.name) for f in fields(args) if f.name in VARIANTS and getattr(args, f.name) != f.default)


def check_ranges(args: Args) -> None:
    """Raises BadInput if a number is out of range, or does not go with another."""
    if args.eta == 0 and args.eval_candidates > 1:
        raise BadInput("--eta 0 trains no critics to choose by: leave out --eval-candidates, or give a small --eta")
    if args.eta == 0 and variants(args):
        raise BadInput(f"--eta 0 trains no critics: leave out {variants(args)}, or give a small --eta")
    if args.eval_episodes > SIDE_BY_SIDE and args.eval_episodes % SIDE_BY_SIDE:
        raise BadInput(f"--eval-episodes above {SIDE_BY_SIDE} must be a multiple of it, not {args.eval_episodes:,}")
    if args.score_range and not -math.inf < args.score_range[0] < args.score_range[1] < math.inf:
        raise BadInput(f"--score-range is {args.score_range}: LOW must be below HIGH")
    for names, good, wanted in (
        ("num_seeds num_updates batch_size num_steps average_every eval_every eval_episodes eval_candidates log_every "
         "checkpoint_every",
         lambda v: 1 <= v < 2**31, "at least 1 and below 2^31"),
        ("hidden_dim hidden_layers", lambda v: 1 <= v <= 100_000, "at least 1 and at most 100,000"),
        ("num_steps num_seeds", lambda v: v <= 10_000, "at most 10,000"),
        ("num_critics", lambda v: 2 <= v <= 100, "at least 2 and at most 100"),
        ("pessimism", lambda v: v is None or 0 <= v < 1e18, "at least 0 and below 1e18"),
        ("eta grad_norm average_from eval_temperature offline_rank",
         lambda v: 0 <= v < 1e18, "at least 0 and below 1e18"),
        ("seed", lambda v: 0 <= v <= 2**31 - args.num_seeds, "at least 0, and the last of the seeds below 2^31"),
        ("learning_rate", lambda v: 0 < v < math.inf, "finite and above 0"),
        ("gamma tau average_decay", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ):  # fmt: skip
        for name in names.split():
            if not good(getattr(args, name)):
                raise BadInput(f"{flag(name)} is {getattr(args, name)}, it must be {wanted}")


# ----------------------------------------------------------------------------- args.json and resuming


def as_json(args: Args) -> dict:
    """args as args.json holds them."""
    return json.loads(json.dumps(asdict(args), default=str))


def read(kind: type, folder: Path) -> Args:
    """The arguments that a run's args.json holds. Raises BadInput."""
    try:
        saved = json.loads((folder / "args.json").read_text())
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
    except FileNotFoundError:
        raise BadInput(f"{folder} is not the folder of a run: it has no args.json") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{folder / 'args.json'} is damaged, or another program's: {error}") from None


def named(argv: list[str]) -> list[str]:
    """The fields whose flags stand on a command line."""
    words = [split(word)[0] for word in argv if word.startswith("--")]
    return [re.sub("^--(no-)?", "", word).replace("-", "_") for word in words]


def resumed(given: Args, saved: Args) -> Args:
    """The arguments of the run to resume, saved, with those that may change as given. Raises BadInput."""
    given = typed(given)
    whole = given.resume.resolve().parent
    if re.fullmatch(r"seed-\d+", given.resume.resolve().name) and (whole / "args.json").exists():
        raise BadInput(f"{given.resume} is a part of the run {whole}: resume that, or a copy of the part elsewhere")
    check_trust(given.env_id, saved.env_id, given.resume)
    changed = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != f.default}
    refuse_changes(given, saved, changed)
    changed |= {name: getattr(given, name) for name in ("track", "capture_video")}  # of this process alone
    args = replace(saved, **changed)
    check_ranges(args)
    return args


def check_trust(given_id: str | None, saved_id: str, folder: Path) -> None:
    """Raises BadInput if a run's environment is code of a module that was not named again."""
    if ":" in saved_id and given_id != saved_id:  # args.json is a file: nothing that it names is imported
        raise BadInput(f"the environment of {folder} is code of a module: if you trust it, give "
                       f"--env-id {saved_id} too")  # fmt: skip


def refuse_changes(given: Args, saved: Args, names: Iterable[str]) -> None:
    """Raises BadInput if an argument of these names, outside FREE, differs from the run's; num_updates may grow."""
    differ = [name for name in names if name not in FREE and getattr(given, name) != getattr(saved, name)]
    if "num_updates" in differ and may_grow(saved.num_updates, given.num_updates, saved.lr_decay):
        differ.remove("num_updates")
    if differ:
        flags = [f"{flag(n)} {getattr(given, n)} (the run's: {getattr(saved, n)})" for n in differ]
        but = " (updates may only grow in number, and not with --lr-decay)" if "num_updates" in differ else ""
        raise BadInput(f"a resumed run keeps its arguments; leave out {', '.join(flags)}{but}")


def may_grow(num_updates: int, more: int, lr_decay: bool) -> bool:
    """Whether a run may be extended to more updates: what it has done must not depend on where it was to end."""
    return num_updates < more and not lr_decay
