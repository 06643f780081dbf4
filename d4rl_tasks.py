"""D4RL's tasks (Fu et al. 2020, arXiv 2004.07219) on maintained packages: data files, environments, reference scores.

The twenty tasks of the paper's Table 1 and halfcheetah-demo-v0. `load_dataset` returns the arrays of D4RL 1.1's
`qlearning_dataset`; `make_env` returns environments whose single steps equal those of gym, mujoco-py and d4rl. Tasks of
the same names in today's gymnasium differ. In D4RL:
- HalfCheetah, Hopper, Walker2d, AntMaze: bodies have other masses, for MuJoCo before 2.1.2 gave a capsule the mass of a
  cylinder longer by half its radius at both ends.
- Hopper, Walker2d: the bonus for being alive is also paid on the step that ends an episode.
- AntMaze: the ant has its own time step, contacts, motors and mazes, and observes its position but not its goal.
- Pen: dropping it ends the episode. Kitchen: noise, observation and one collision differ.
MuJoCo 3.2.6 collides bodies as D4RL's 2.1.0 did; 3.2.7 no longer does so at antmaze's walls, 3.3 in pen and kitchen.
gymnasium, mujoco, h5py, minari and the classic stack are imported when they are used; the module needs numpy alone.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import http.client
import math
import os
import re
import ssl
import stat
import sys
import time
import types
import urllib.error
import urllib.request
import warnings
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import gymnasium


class BadInput(ValueError):
    """An error that the user can fix; the message is one line that says what is wrong and how to fix it."""

    exit_code = 2

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) < 2000 else f"{line[:1000]} [...] {line[-900:]}")


def reason(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------- the tasks


class Task(NamedTuple):
    family: str  # whose environment: halfcheetah, hopper, walker2d, antmaze, pen or kitchen
    state_dim: int
    action_dim: int
    max_episode_steps: int
    ref_min_score: float  # return of D4RL's random policy, 0 on the normalized scale
    ref_max_score: float  # return of D4RL's expert, 100 on the normalized scale
    url: str  # of the data file; empty if it lies beside this module
    sha256: str = ""  # of the published file, where known
    size: int = 0  # of the published file in bytes, where known


RAIL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # the same files by the same names, in one folder
DEMO_FILE = Path(__file__).parent / "demo" / "halfcheetah-demo-v0.hdf5"
KNOWN = {  # sha256 and size of published files
    "mini_kitchen_microwave_kettle_light_slider-v0.hdf5":
        ("cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81", 556_544),
    "hopper_medium_replay-v2.hdf5": ("e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b", 75_854_457),
    "walker2d_medium_replay-v2.hdf5": ("e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db", 86_323_963),
    "hopper_medium_expert-v2.hdf5": ("9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",),
}  # fmt: skip


def _tasks() -> dict[str, Task]:
    """The tasks as d4rl 1.1 registers them (its infos.py and __init__.py files)."""
    tasks = {}

    def add(env_id: str, file: str, *numbers: float) -> None:
        tasks[env_id] = Task(env_id.split("-")[0], *numbers, RAIL + file, *KNOWN.get(file.rsplit("/")[-1], ()))

    for data in ("medium", "medium-replay", "medium-expert"):
        file = f"{data.replace('-', '_')}-v2.hdf5"
        add(f"halfcheetah-{data}-v2", f"gym_mujoco_v2/halfcheetah_{file}", 17, 6, 1000, -280.178953, 12135.0)
        add(f"hopper-{data}-v2", f"gym_mujoco_v2/hopper_{file}", 11, 3, 1000, -20.272305, 3234.3)
        add(f"walker2d-{data}-v2", f"gym_mujoco_v2/walker2d_{file}", 17, 6, 1000, 1.629008, 4592.3)
    for maze, file, steps in (
        ("umaze", "u-maze_noisy_multistart_False_multigoal_False", 700),
        ("umaze-diverse", "u-maze_noisy_multistart_True_multigoal_True", 700),
        ("medium-play", "big-maze_noisy_multistart_True_multigoal_False", 1000),
        ("medium-diverse", "big-maze_noisy_multistart_True_multigoal_True", 1000),
        ("large-play", "hardest-maze_noisy_multistart_True_multigoal_False", 1000),
        ("large-diverse", "hardest-maze_noisy_multistart_True_multigoal_True", 1000),
    ):
        add(f"antmaze-{maze}-v0", f"ant_maze_new/Ant_maze_{file}_sparse.hdf5", 29, 8, steps, 0.0, 1.0)
    for data in ("human", "cloned"):
        add(f"pen-{data}-v1", f"hand_dapg_v1/pen-{data}-v1.hdf5", 45, 24, 100, 96.262799, 3076.8331017826877)
    for data, file in (
        ("complete", "mini_kitchen_microwave_kettle_light_slider"),
        ("partial", "kitchen_microwave_kettle_light_slider"),
        ("mixed", "kitchen_microwave_kettle_bottomburner_light"),
    ):
        add(f"kitchen-{data}-v0", f"kitchen/{file}-v0.hdf5", 60, 9, 280, 0.0, 4.0)
    tasks["halfcheetah-demo-v0"] = tasks["halfcheetah-medium-v2"]._replace(url="")
    return tasks


TASKS = _tasks()


def task_of(env_id: str, backend: str = "maintained") -> Task:
    """The task of that id. Raises BadInput for an unknown id, naming the closest ones, or an unknown backend."""
    if env_id not in TASKS:
        close = difflib.get_close_matches(env_id, TASKS, n=3) or TASKS
        raise BadInput(f"unknown env id {env_id!r}: did you mean {', '.join(close)}?")
    if backend not in ("maintained", "d4rl"):
        raise BadInput(f"unknown backend {backend!r}: it is 'maintained' or 'd4rl'")
    return TASKS[env_id]


def normalized_score(env_id: str, return_: Any) -> Any:
    """100 (return - random) / (expert - random), of a number or an array of returns (D4RL, section 5)."""
    task = task_of(env_id)
    return 100.0 * (return_ - task.ref_min_score) / (task.ref_max_score - task.ref_min_score)


# ----------------------------------------------------------------------------------------------------------- the data


def load_dataset(env_id: str, path: str | os.PathLike | None = None, backend: str = "maintained") -> dict:
    """The task's transitions, exactly those of D4RL 1.1's `qlearning_dataset`, or those of a Minari data set.

    Args: path is a D4RL HDF5 file or a Minari folder; without it, D4RL's file in $D4RL_DATASET_DIR (by default
    ~/.d4rl/datasets), which is downloaded if it is not there. backend "d4rl" reads with d4rl itself.
    Returns: numpy arrays observations and next_observations (n, state_dim), actions (n, action_dim) in [-1, 1], rewards
    (n,), all float32, neither normalized nor clipped, and terminals (n,) bool; rows in file order.
    Raises: BadInput if the data cannot be had, read or used.
    """
    task = task_of(env_id, backend)
    try:
        path = Path(os.path.expanduser(path)) if path is not None else _data_file(env_id, task)
        if backend == "d4rl":
            return _classic_dataset(env_id, path)
        return _read_minari(path, task) if os.path.isdir(path) else _transitions(_read_hdf5(path, task), task, path)
    except MemoryError:  # of a download too, which is kept
        raise BadInput(f"the data of {env_id} do not fit into memory: free some, or give a smaller file") from None


def _read_hdf5(path: Path, task: Task) -> dict[str, np.ndarray]:
    """Observations, actions and rewards (float32), terminals and, where the file has them, timeouts (bool)."""
    _package("h5py")
    import h5py

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path} is not a file: give a D4RL HDF5 file or the folder of a Minari data set")
        with h5py.File(path, "r") as file:
            names = ["observations", "actions", "rewards", "terminals"]
            names += ["timeouts"] if file.id.links.exists(b"timeouts") else []
            columns = {name: _column(file, name, status.st_size) for name in names}
            return _checked(columns, task, path)
    except (BadInput, MemoryError):
        raise
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: give a D4RL HDF5 file or the folder of a Minari data set") from None
    except Exception as error:  # h5py raises nearly every kind of exception on damaged files
        raise BadInput(f"{path} cannot be read as HDF5 ({error}): if it is not whole, fetch it anew") from None


def _column(file: Any, name: str, file_size: int) -> Any:
    """The h5py data set of that name, if it lies in this file and the file can hold as much as it claims to."""
    import h5py

    if not file.id.links.exists(name.encode()):
        raise BadInput(f"{file.filename} has no {name}: D4RL's files have observations, actions, rewards, terminals")
    hard = file.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD  # other links may lead out of the file
    column = file[name] if hard else None
    if not isinstance(column, h5py.Dataset) or column.shape is None or column.is_virtual or column.external:
        raise BadInput(f"{file.filename}: {name} is a link, group or void instead of data: copy the data into the file")
    chunks, claimed = 1, column.nbytes
    if column.chunks:  # HDF5 unpacks them whole, however few rows of theirs the column has
        chunks = math.prod(-(-rows // piece) for rows, piece in zip(column.shape, column.chunks, strict=True))
        claimed = chunks * math.prod(column.chunks) * column.dtype.itemsize
    if chunks > file_size or claimed > 2**24 + 20 * min(column.id.get_storage_size(), file_size):
        raise BadInput(f"{file.filename}: {name} claims {claimed:,} bytes, which the file cannot hold: write it anew")
    return column


def _checked(columns: dict[str, Any], task: Task, path: Path) -> dict[str, np.ndarray]:
    """Columns of h5py or numpy as float32, and flags as bool. Raises BadInput unless they fit the task."""
    rows = columns["observations"].shape[:1]
    widths = {"observations": task.state_dim, "next_observations": task.state_dim, "actions": task.action_dim}
    arrays = {}
    for name, column in columns.items():
        shape = (*rows, widths[name]) if name in widths else rows
        if column.shape != shape and (name in widths or column.shape != (*shape, 1)):
            raise BadInput(f"{path}: {name} have shape {column.shape} instead of {shape}: is it {task.family} data?")
        if column.dtype.kind not in "biuf":
            raise BadInput(f"{path}: {name} are of type {column.dtype}, not numbers: write them as float32")
        flag = name in ("terminals", "timeouts")
        values = (column[...] if flag else column.astype(np.float32)[...]).reshape(shape)
        if not np.isfinite(values).all():
            row = np.flatnonzero(~np.isfinite(values).reshape(*rows, -1).all(axis=1))[0]
            raise BadInput(f"{path}: {name} of row {row} are not finite in float32: fix or leave out that row")
        largest = np.abs(values).max(initial=0) if name == "actions" else 0
        if largest > 2:  # not clipped: the scale would be wrong
            raise BadInput(f"{path}: actions reach {largest:g}, D4RL's lie in [-1, 1]: rescale them")
        if largest > 1.00001:
            warnings.warn(f"{path}: actions reach {largest:g}; the policy's end at 1", stacklevel=2)
        arrays[name] = values != 0 if flag else values
    return arrays


def _transitions(rows: dict[str, np.ndarray], task: Task, path: Path) -> dict[str, np.ndarray]:
    """D4RL's choice of rows: not the last one, which has no successor, and none at which an episode is truncated."""
    final = rows["timeouts"] if "timeouts" in rows else _count_ends(rows["terminals"], task.max_episode_steps)
    kept = ~final[:-1]
    if not kept.any():
        raise BadInput(f"{path} holds no transition: it takes two rows at least, and one that is no timeout")
    columns = {name: rows.pop(name)[:-1][kept] for name in ("actions", "rewards", "terminals")}  # pop spares memory
    observations = rows.pop("observations")
    return {"observations": observations[:-1][kept], **columns, "next_observations": observations[1:][kept]}


def _count_ends(terminals: np.ndarray, limit: int) -> np.ndarray:
    """The rows that D4RL takes for truncated, by counting steps, in a file without timeouts: (rows,) bool.

    The count starts at 0, at 0 after a row left out, and at 1 after a terminal row; at limit - 1 a row is left out.
    """
    final = np.zeros(len(terminals), bool)
    ends = np.append(np.flatnonzero(terminals), len(terminals) - 1)
    before = np.append(-1, ends[:-1])
    long = ends - before >= limit - 1  # between other pairs of terminal rows no count goes so far
    for last, end in zip(before[long].tolist(), ends[long].tolist(), strict=True):
        start = last + (last < 0 or int(final[last]))  # the row at which the count is 0
        final[start + limit - 1 : end + 1 : limit] = True
    return final


def _read_minari(path: Path, task: Task) -> dict[str, np.ndarray]:
    """The transitions of a Minari data set; a truncated step is one of them, for its next observation is there."""
    try:
        import minari

        folder = path / "data" if (path / "data").is_dir() else path
        episodes = list(minari.MinariDataset(folder).iterate_episodes())
        columns = {
            "observations": np.concatenate([episode.observations[:-1] for episode in episodes]),
            "actions": np.concatenate([episode.actions for episode in episodes]),
            "next_observations": np.concatenate([episode.observations[1:] for episode in episodes]),
            "rewards": np.concatenate([episode.rewards for episode in episodes]),
            "terminals": np.concatenate([episode.terminations for episode in episodes]),
        }
    except ImportError as error:
        raise BadInput(f"{path} is a folder, which minari reads ({error}): pip install 'minari[hdf5]'") from None
    except Exception as error:  # no Minari data set, a damaged one, or observations that are no plain arrays
        raise BadInput(f"{path} cannot be read as a Minari data set of plain arrays ({error})") from None
    return _checked(columns, task, path)


# ------------------------------------------------------------------------------------------------------- the download

TIMEOUT, BACK_OFF, ATTEMPTS = 30.0, 1.0, 5  # seconds without a byte, seconds to the next attempt, attempts in vain
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def _data_file(env_id: str, task: Task) -> Path:
    """The path of the task's data file, which is downloaded if it is not there."""
    if not task.url:
        return DEMO_FILE
    folder = os.environ.get("D4RL_DATASET_DIR") or os.path.join("~", ".d4rl", "datasets")
    path = Path(os.path.expanduser(folder)) / task.url.rsplit("/", 1)[1]
    if not os.path.exists(path):
        download(env_id, path)
    return path


def download(env_id: str, path: Path) -> None:
    """Fetches the task's data file to path, from D4RL's server or else from the mirror.

    The bytes go to path.part, where an interrupted download continues; the whole file is checked and only then renamed.
    Raises: BadInput with the reasons, the URL, the path and the other way to provide the data.
    """
    for package in ("tqdm", "h5py"):  # before anything is fetched
        _package(package)
    task, part, reasons = TASKS[env_id], path.with_name(path.name + ".part"), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_name(path.name + ".lock")):
            sources = [task.url, MIRROR + path.name]
            while sources and not path.exists():  # another process may have brought it while this one waited
                resumed = part.exists()
                print(f"downloading {sources[0]}", file=sys.stderr)
                try:
                    _fetch(sources[0], part)
                    _verify(part, task)
                    os.replace(part, path)
                except BadInput as error:
                    reasons.append(f"{sources[0]}: {error}")
                    part.unlink()
                    del sources[: not resumed]  # what an old part may have spoilt is fetched again, whole
                except NETWORK as error:
                    reasons.append(f"{sources.pop(0)}: {error}")
                    if sources and not task.sha256:  # nothing would tell a file pieced together of two
                        part.unlink(missing_ok=True)
            if path.exists():
                return
    except OSError as error:  # the folder or disk
        reasons.append(str(error))
    raise BadInput(
        f"no data for {env_id} ({'; '.join(reasons)}): put {task.url} at {path}, or give a file with --dataset-path"
    )


def _fetch(url: str, part: Path) -> None:
    """Downloads url to part, continuing what is there, with ever longer pauses after attempts that bring nothing."""
    tries = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            return _fetch_from(start, url, part)
        except NETWORK as error:
            code = getattr(error, "code", 0)
            if code == 416 and start:  # there are no bytes from start on: part is whole, or it is no part of this file
                if (error.headers.get("Content-Range") or "").endswith(f"/{start}"):
                    return None
                part.unlink()
                continue
            tries = 0 if part.exists() and part.stat().st_size > start else tries + 1
            if tries == ATTEMPTS or 400 <= code < 500:
                raise
            time.sleep(BACK_OFF * 2**tries)


def _fetch_from(start: int, url: str, part: Path) -> None:
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
        if response.status == 206 and (not sent or int(sent[1]) != start):
            part.unlink()
            raise ConnectionError(f"the server sent other bytes than those from {start:,} on")
        start = start if response.status == 206 else 0  # a server that knows no ranges sends it all
        total = None if response.length is None else start + response.length
        bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True)
        with bar, open(part, "ab" if start else "wb") as file:
            while block := response.read1(2**16):
                bar.update(file.write(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"the connection broke after {part.stat().st_size:,} of {total:,} bytes")


def _verify(part: Path, task: Task) -> None:
    """Raises BadInput unless the file has its published size and hash, where known, and holds the task's data."""
    if task.size not in (0, part.stat().st_size):
        raise BadInput(f"it has {part.stat().st_size:,} bytes instead of {task.size:,}")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if task.sha256 not in ("", digest.hexdigest()):
        raise BadInput(f"its sha256 is {digest.hexdigest()} instead of {task.sha256}")
    _read_hdf5(part, task)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Waits for and holds a lock between processes, which the system releases however its holder ends."""
    with open(path, "wb") as file:
        try:
            import fcntl
        except ImportError:  # Windows, where a lock is waited for ten seconds at a time
            import msvcrt

            while True:
                with contextlib.suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is downloading {path.stem}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------- the environments


def make_env(env_id: str, backend: str = "maintained", render_mode: str | None = None) -> gymnasium.Env:
    """The task's environment, equal to D4RL's.

    Observations are float64 (state_dim,), actions (action_dim,) in [-1, 1], episodes are truncated at
    max_episode_steps, and reset(seed=s) always begins the same episode. Environments of a kind share one compiled
    model, so the hundredth costs next to nothing. backend "d4rl" is the classic stack itself.
    Raises: BadInput for an unknown id or backend, or a package that is missing or of the wrong version.
    """
    task = task_of(env_id, backend)
    _package("gymnasium")
    from gymnasium.wrappers import TimeLimit

    if backend == "d4rl":
        return _with_gymnasium(Classic)(env_id, render_mode)
    return TimeLimit(_with_gymnasium(FAMILIES[task.family])(env_id, render_mode), task.max_episode_steps)


def make_envs(env_id: str, n: int, backend: str = "maintained") -> list[gymnasium.Env]:
    """n environments of the task, for n episodes side by side; each may be stepped in a thread of its own."""
    return [make_env(env_id, backend) for _ in range(n)]


def rendering_env(env_id: str, backend: str = "maintained") -> gymnasium.Env:
    """An environment for a video, tested before the training starts. Raises BadInput if it cannot render."""
    if find_spec("moviepy") is None:
        raise BadInput("--capture-video needs moviepy: pip install moviepy")
    env = make_env(env_id, backend, render_mode="rgb_array")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing backend, which the error below reports
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:  # every OpenGL backend fails in its own way
        raise BadInput(f"--capture-video cannot render here ({reason(error)}): try MUJOCO_GL=egl or =osmesa") from None


@functools.cache
def _with_gymnasium(kind: type) -> type[gymnasium.Env]:
    """Makes kind a gymnasium.Env: only now, for this module must import without gymnasium."""
    import gymnasium

    return type(kind.__name__, (kind, gymnasium.Env), {})


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(name)
    if spec is None:
        raise BadInput(f"{name} is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _mujoco() -> types.ModuleType:
    _package("mujoco")
    import mujoco

    if mujoco.__version__ != "3.2.6":
        raise BadInput(f"mujoco {mujoco.__version__} does not move as D4RL's: pip install mujoco==3.2.6")
    return mujoco


@functools.cache
def _model(family: str, maze: str) -> Any:
    """The MjModel of D4RL's task, compiled by today's MuJoCo."""
    mujoco = _mujoco()
    if family not in ("pen", "kitchen"):
        name = {"halfcheetah": "half_cheetah", "antmaze": "ant"}.get(family, family)
        root = ET.parse(_package("gymnasium") / "envs" / "mujoco" / "assets" / f"{name}.xml").getroot()
        if family == "antmaze":
            _build_maze(root, maze)
        _weigh_capsules(root)
        return mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))
    file = "adroit_hand/adroit_pen.xml" if family == "pen" else "kitchen_franka/kitchen_assets/kitchen_env_model.xml"
    spec = mujoco.MjSpec.from_file(str(_package("gymnasium_robotics") / "envs" / "assets" / file))
    if family == "pen":
        spec.find_body("target").mocap = True  # its orientation is then part of the data, not of the shared model
        model = spec.compile()
        for first, last, gain in (("A_WRJ1", "A_WRJ0", 10), ("A_FFJ3", "A_THJ0", 1)):
            motors = slice(model.actuator(first).id, model.actuator(last).id + 1)
            model.actuator_gainprm[motors, :3] = gain, 0, 0
            model.actuator_biasprm[motors, :3] = 0, -gain, 0
    else:
        model = spec.compile()
        stand = np.isclose(model.geom_size[:, :2], [0.12, 0.9]).all(axis=1)  # the robot's: only drawn in d4rl
        model.geom_contype[stand] = model.geom_conaffinity[stand] = 0
    return model


def _weigh_capsules(root: ET.Element) -> None:
    """Adds to each capsule the longer cylinder that MuJoCo before 2.1.2 weighed in its place.

    The cylinder collides with nothing, is not drawn (group 3) and has all the mass and inertia; the capsule has none.
    """
    for body in root.iter("body"):
        for capsule in [geom for geom in body.findall("geom") if geom.get("type") == "capsule"]:
            cylinder = ET.SubElement(body, "geom", {key: x for key, x in capsule.items() if key != "name"})
            cylinder.attrib.update(type="cylinder", contype="0", conaffinity="0", group="3")
            radius, *half = map(float, capsule.get("size").split())
            if half:
                cylinder.set("size", f"{radius!r} {half[0] + radius / 2!r}")
            else:
                ends = np.array(capsule.get("fromto").split(), float).reshape(2, 3)
                longer = np.diff(ends, axis=0) / np.linalg.norm(np.diff(ends, axis=0)) * radius / 2
                cylinder.set("fromto", " ".join(map(repr, (ends + [[-1], [1]] * longer).ravel().tolist())))
            capsule.set("mass", "0")


def _build_maze(root: ET.Element, maze: str) -> None:
    """Turns gymnasium's ant into d4rl's and builds the walls of its maze around it."""
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
    for motor in root.find("actuator"):
        motor.attrib.update(gear="1", ctrlrange="-30 30")
    for x, y in _cells(maze, "#"):
        wall = {"type": "box", "contype": "1", "conaffinity": "1", "size": "2 2 1", "rgba": ".7 .5 .3 1"}
        ET.SubElement(root.find("worldbody"), "geom", wall, pos=f"{x} {y} 1")


MAZES = {  # the ant starts in the first free cell, at the origin, its goal is G; cells are 4 wide
    "umaze": "##### #...# ###.# #G..# #####",
    "medium": "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
}  # fmt: skip


def _cells(maze: str, kind: str) -> list[tuple[float, float]]:
    """The centers of a maze's cells of one kind."""
    rows = enumerate(MAZES[maze].split())
    return [(4.0 * (x - 1), 4.0 * (y - 1)) for y, row in rows for x, cell in enumerate(row) if cell == kind]


CAMERAS = {  # the other families' models have cameras that follow them
    "antmaze": {"distance": 60.0, "elevation": -90.0},
    "pen": {"distance": 1.0, "azimuth": -45.0},
    "kitchen": {"distance": 2.2, "azimuth": 70.0, "elevation": -35.0, "lookat": np.array([-0.2, 0.5, 2.0])},
}


class Simulated:
    """What all families share: MuJoCo's model and data, and the gymnasium interface around a family's rules.

    The rules are start (initial positions and velocities), control (the motors' input), observe, and judge (the reward,
    and whether the episode ends).
    """

    frame_skip = 5  # MuJoCo's steps in one of the environment's

    def __init__(self, env_id: str, render_mode: str | None = None):
        from gymnasium.spaces import Box

        self.family, self.variant = env_id.split("-")[:2]
        self.model = _model(self.family, self.variant if self.family == "antmaze" else "")
        self.data = _mujoco().MjData(self.model)
        self.dt = self.frame_skip * self.model.opt.timestep
        self.render_mode, self.renderer = render_mode, None
        self.metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": round(1 / self.dt)}
        self.observation_space = Box(-np.inf, np.inf, (TASKS[env_id].state_dim,), np.float64)
        self.action_space = Box(-1.0, 1.0, (TASKS[env_id].action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        _mujoco().mj_resetData(self.model, self.data)
        self.set_state(*self.start(self.np_random, seed is not None))
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        x, control = self.data.qpos[0], self.control(np.asarray(action))
        self.data.ctrl[:] = control
        _mujoco().mj_step(self.model, self.data, nstep=self.frame_skip)
        observation = self.observe()
        reward, terminated = self.judge(observation, control, (self.data.qpos[0] - x) / self.dt)
        return observation, float(reward), bool(terminated), False, {}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Sets positions (nq,) and velocities (nv,)."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        _mujoco().mj_normalizeQuat(self.model, self.data.qpos)  # mj_forward once did this, so observations show it
        _mujoco().mj_forward(self.model, self.data)

    def control(self, action: np.ndarray) -> np.ndarray:
        """d4rl's NormalizedBoxEnv, in the action's own precision: equal to the last bit of float32."""
        high = self.model.actuator_ctrlrange[0, 1].astype(action.dtype)
        return np.clip((action + 1) * high - high, -high, high)

    def render(self) -> np.ndarray | None:
        if self.renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            camera = CAMERAS.get(self.family)
            self.renderer = MujocoRenderer(self.model, self.data, camera, 480, 480, camera_id=None if camera else 0)
        return self.renderer.render(self.render_mode)

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()


class Locomotion(Simulated):
    """HalfCheetah, Hopper and Walker2d of gym's v2."""

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.frame_skip = 5 if env_id.startswith("halfcheetah") else 4
        super().__init__(env_id, render_mode)

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        nv = self.model.nv
        if self.family == "halfcheetah":
            return self.model.qpos0 + rng.uniform(-0.1, 0.1, nv), 0.1 * rng.standard_normal(nv)
        return self.model.qpos0 + rng.uniform(-0.005, 0.005, nv), rng.uniform(-0.005, 0.005, nv)

    def observe(self) -> np.ndarray:
        limit = np.inf if self.family == "halfcheetah" else 10
        return np.concatenate([self.data.qpos[1:], np.clip(self.data.qvel, -limit, limit)])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        effort = float(np.square(control).sum())
        if self.family == "halfcheetah":
            return speed - 0.1 * effort, False
        height, angle = self.data.qpos[1:3]
        if self.family == "hopper":
            rest = np.concatenate([self.data.qpos[2:], self.data.qvel])
            alive = height > 0.7 and abs(angle) < 0.2 and (np.abs(rest) < 100).all()
        else:
            alive = 0.8 < height < 2 and -1 < angle < 1
        return speed + 1 - 1e-3 * effort, not alive


class AntMaze(Simulated):
    """AntMaze-v0 of d4rl: reward 1 at the goal, where the episode ends, and 0 elsewhere.

    The goal is drawn once per environment, as in d4rl, and anew by a reset with a seed, from that seed.
    """

    goal = None  # xy

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.goal is None or seeded:
            cell = _cells(self.variant, "G")[0]
            self.goal = np.maximum(cell + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0)
        return self.model.qpos0 + rng.uniform(-0.1, 0.1, 15), 0.1 * rng.standard_normal(14)

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        there = np.linalg.norm(observation[:2] - self.goal) <= 0.5
        return there, there


class Pen(Simulated):
    """Adroit's pen of d4rl: turn it to the orientation of the target; dropping it ends the episode."""

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        half = rng.uniform(-1, 1, 2) / 2  # turns about x and y
        (sx, sy), (cx, cy) = np.sin(half), np.cos(half)
        self.set_target(np.array([cx * cy, sx * cy, cx * sy, sx * sy]))
        return self.model.qpos0, np.zeros(self.model.nv)

    def set_target(self, quaternion: np.ndarray) -> None:
        self.data.mocap_quat[self.model.body("target").mocapid] = quaternion

    def control(self, action: np.ndarray) -> np.ndarray:
        low, high = self.model.actuator_ctrlrange.T
        return (low + high) / 2 + np.clip(action, -1, 1) * ((high - low) / 2)

    def observe(self) -> np.ndarray:
        data = self.data
        place = data.body("Object").xpos
        axis = (data.site("object_top").xpos - data.site("object_bottom").xpos) / 0.13  # their distance
        target = (data.site("target_top").xpos - data.site("target_bottom").xpos) / 0.13
        away = place - data.site("eps_ball").xpos
        return np.concatenate([data.qpos[:-6], place, data.qvel[-6:], axis, target, away, axis - target])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        distance, likeness = np.linalg.norm(observation[39:42]), observation[33:36] @ observation[36:39]
        near, dropped = distance < 0.075, observation[26] < 0.075
        bonus = 10 * (near and likeness > 0.9) + 50 * (near and likeness > 0.95)
        return likeness - distance + bonus - 5 * dropped, dropped


KITCHEN_START = np.array([
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394, 0.0479267505, 0.0371350919,
    -2.6627985e-4, -5.18043486e-5, 3.1287722e-5, -4.51199853e-5, -3.90842156e-6, -4.22629655e-5, 6.28065475e-5,
    4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4, -6.44129196e-3, -1.77048263e-3, 1.08009684e-3,
    -0.26939744, 0.350383255, 1.61944683, 1.00618764, 4.0639512e-3, -6.62095997e-3, -2.68278933e-4,
])  # fmt: skip
KITCHEN_NOISE = 0.1 * np.repeat([0.1, 5e-3, 5e-4, 5e-3, 0.1, 5e-3, 0.1, 5e-3], [9, 2, 6, 3, 3, 3, 3, 1])
KITCHEN_LIMITS = (  # of the robot's nine joints
    np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0]),
    np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04]),
)
KITCHEN_GOALS = {  # for each thing the indices of its positions, and their target values
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}


class Kitchen(Simulated):
    """FrankaKitchen of d4rl: reward 1 for each of four things when it first reaches its goal; the end when all have."""

    frame_skip = 40

    def __init__(self, env_id: str, render_mode: str | None = None):
        super().__init__(env_id, render_mode)
        fourth = "bottom burner" if self.variant == "mixed" else "slide cabinet"
        self.things = ("microwave", "kettle", "light switch", fourth)
        self.noise, self.goal = KITCHEN_NOISE, np.zeros(30)
        for places, values in (KITCHEN_GOALS[thing] for thing in self.things):
            self.goal[places] = values

    def start(self, rng: np.random.Generator, seeded: bool) -> tuple[np.ndarray, np.ndarray]:
        self.todo = set(self.things)
        return KITCHEN_START, np.zeros(self.model.nv)

    def control(self, action: np.ndarray) -> np.ndarray:
        """Speeds of at most 2, as position targets: observed (noisy) positions plus speed times dt, within limits."""
        return np.clip(self.seen[:9] + 2 * np.clip(action, -1, 1).astype(float) * self.dt, *KITCHEN_LIMITS)

    def observe(self) -> np.ndarray:
        self.seen = self.data.qpos + self.noise * self.np_random.uniform(-1, 1, 30)
        return np.concatenate([self.seen, self.goal])

    def judge(self, observation: np.ndarray, control: np.ndarray, speed: float) -> tuple[float, bool]:
        off = self.seen - self.goal
        done = {thing for thing in self.todo if np.linalg.norm(off[KITCHEN_GOALS[thing][0]]) < 0.3}
        self.todo -= done
        return len(done), not self.todo


FAMILIES = dict.fromkeys(("halfcheetah", "hopper", "walker2d"), Locomotion)
FAMILIES |= {"antmaze": AntMaze, "pen": Pen, "kitchen": Kitchen}


# -------------------------------------------------------------------------- the classic stack: gym, mujoco-py and d4rl


def _classic_make(env_id: str) -> Any:
    """gym.make(env_id); the demo's environment is HalfCheetah's."""
    try:
        import collections
        import collections.abc

        collections.Mapping = collections.abc.Mapping  # d4rl's kitchen looks for it where it was before Python 3.10
        import gym

        if find_spec("mjrl") is None:  # not on PyPI; d4rl needs only its base class, which gym has too
            from gym.envs import mujoco

            modules = {"mjrl": gym.envs, "mjrl.envs": mujoco, "mjrl.envs.mujoco_env": mujoco.mujoco_env}
            sys.modules.update(modules)
        import d4rl  # noqa: F401  (registers its environments)

        return gym.make(env_id.replace("-demo-v0", "-medium-v2"))
    except Exception as error:  # of whatever kind: packages, compilers and libraries may be missing
        raise BadInput(
            f"backend 'd4rl' needs gym, mujoco-py and d4rl ({error}): pip install -r requirements-classic.txt"
        ) from None


def _classic_dataset(env_id: str, path: Path) -> dict[str, np.ndarray]:
    env = _classic_make(env_id)
    import d4rl

    try:
        return d4rl.qlearning_dataset(env, dataset=env.get_dataset(h5path=str(path)))
    except Exception as error:  # whatever h5py says, or d4rl's assertions
        raise BadInput(f"{path} cannot be read by d4rl ({error}): is it D4RL's data of {env_id}?") from None


class Classic:
    """An environment of the classic stack (gym), with gymnasium's interface."""

    def __init__(self, env_id: str, render_mode: str | None = None):
        from gymnasium.spaces import Box

        self.classic, self.render_mode = _classic_make(env_id), render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.observation_space = Box(-np.inf, np.inf, (TASKS[env_id].state_dim,), np.float64)
        self.action_space = Box(-1.0, 1.0, (TASKS[env_id].action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            inner = self.classic.unwrapped
            inner = getattr(inner, "wrapped_env", inner)  # d4rl's wrapper of antmaze swallows the seed
            inner.seed(seed)
            if hasattr(inner, "set_target"):  # antmaze draws its goal from numpy's global generator
                state = np.random.get_state()
                np.random.seed(seed)
                inner.set_target()
                np.random.set_state(state)
        return self.classic.reset(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, done, info = self.classic.step(action)
        truncated = info.get("TimeLimit.truncated", False)
        return observation, float(reward), bool(done and not truncated), truncated, {}

    def render(self) -> np.ndarray:
        return self.classic.render(mode=self.render_mode)

    def close(self) -> None:
        self.classic.close()


def step_each(envs: list, actions: list) -> list[tuple]:
    """What each environment's step returns, in order."""
    return [env.step(action) for env, action in zip(envs, actions, strict=True)]
