"""Tests of data files as arrays: D4RL's rule of rows, Minari's folders, damaged files and other files."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from data_files import HOPPER, bad_input, plain_loop, rows_of, same, write

from d4rl_tasks import TASKS, BadInput, files, load_dataset

ROOT = Path(__file__).parents[1]


HAND_MADE = [  # terminals, timeouts or None, the rows that are kept
    ("00000", None, [0, 1, 2, 3]),
    ("01000", None, [0, 1, 2, 3]),
    ("00000", "00100", [0, 1, 3]),
    ("00100", "00100", [0, 1, 3]),  # terminal and timeout: left out
    ("00100", "00010", [0, 1, 2]),
    ("00001", "00001", [0, 1, 2, 3]),  # the last row is never used, whatever it says
    ("11111", "00000", [0, 1, 2, 3]),
    ("00", None, [0]),
    ("10", "01", [0]),
]


@pytest.mark.parametrize(("terminals", "timeouts", "kept"), HAND_MADE)
def test_loader_keeps_the_rows_that_d4rl_keeps(tmp_path, terminals, timeouts, kept):
    columns = rows_of(len(terminals)) | {"terminals": np.array(list(terminals)) == "1"}
    if timeouts:
        columns["timeouts"] = np.array(list(timeouts)) == "1"
    ours = load_dataset(HOPPER, write(tmp_path / "d.hdf5", columns))
    np.testing.assert_array_equal(ours["observations"], columns["observations"][kept])
    np.testing.assert_array_equal(ours["next_observations"], columns["observations"][np.array(kept) + 1])
    np.testing.assert_array_equal(ours["actions"], columns["actions"][kept])
    np.testing.assert_array_equal(ours["rewards"], columns["rewards"][kept])
    np.testing.assert_array_equal(ours["terminals"], columns["terminals"][kept])


def test_step_count_ends_episodes_where_a_plain_count_does():
    """All 2^n patterns of terminal rows, for n up to 11 and episodes of 2 to 5 steps."""
    for n, limit in itertools.product(range(1, 12), range(2, 6)):
        for bits in itertools.product((False, True), repeat=n):
            terminals, count = np.array(bits), 0
            ours = files._count_ends(terminals, limit)
            for i in range(n):
                final = count == limit - 1
                assert ours[i] == final, (bits, limit)
                count = 0 if final else 1 if bits[i] else count + 1


def test_count_ends_by_hand():
    """With episodes of 4 steps, an episode's fourth row is left out, or its third if it follows a terminal row."""
    count_ends = files._count_ends
    assert np.flatnonzero(count_ends(np.zeros(12, bool), 4)).tolist() == [3, 7, 11]
    terminals = np.zeros(12, bool)
    terminals[1] = True  # the count is 1 at row 2 and 3 at row 4
    assert np.flatnonzero(count_ends(terminals, 4)).tolist() == [4, 8]
    terminals[4] = True  # terminal, but also left out: the count begins at 0 again
    assert np.flatnonzero(count_ends(terminals, 4)).tolist() == [4, 8]


def random_columns(seed):
    """(env_id, columns) of a random file, drawn with RandomState because its streams never change."""
    rng = np.random.RandomState(seed)
    env_id = [HOPPER, "kitchen-complete-v0", "pen-human-v1", "antmaze-umaze-v0"][seed % 4]
    task = TASKS[env_id]
    n = rng.randint(2, 3 * task.max_episode_steps)
    columns = {
        "observations": rng.standard_normal((n, task.state_dim)),
        "actions": rng.uniform(-1, 1, (n, task.action_dim)),
        "rewards": rng.standard_normal(n),
        "terminals": rng.uniform(size=n) < rng.choice([0, 0.001, 0.01, 0.3]),
    }
    if rng.uniform() < 0.5:
        columns["timeouts"] = rng.uniform(size=n) < rng.choice([0, 0.01, 0.3])
    for name in ("rewards", "terminals"):
        if rng.uniform() < 0.3:
            columns[name] = columns[name].reshape(n, 1)
    for name in ("observations", "actions", "rewards"):
        columns[name] = columns[name].astype(rng.choice(["f2", "f4", "f8", ">f4"]))
    columns["terminals"] = columns["terminals"].astype(rng.choice(["?", "u1", "i8", "f4"]))
    return env_id, columns | {"next_observations": np.full((n, 2), 7.0)}  # which D4RL never reads


def digest(dataset):
    parts = b"".join(dataset[name].tobytes() for name in sorted(dataset))
    return hashlib.sha256(parts).hexdigest()


@pytest.mark.parametrize("seed", range(40))
def test_loader_equals_a_plain_loop_and_d4rl_on_random_files(tmp_path, seed):
    """classic_qlearning.json has the digests of what the real d4rl.qlearning_dataset returns for the same files."""
    env_id, columns = random_columns(seed)
    path = write(tmp_path / "d.hdf5", columns, compression="gzip" if seed % 3 else None)
    ours = load_dataset(env_id, path)
    same(ours, plain_loop(columns, TASKS[env_id].max_episode_steps))
    frozen = json.loads((ROOT / "reference" / "classic_qlearning.json").read_text())
    assert digest(ours) == frozen[seed]


def test_loader_reads_the_published_kitchen_file_if_it_is_there():
    path = Path(os.environ.get("D4RL_DATASET_DIR", ""), TASKS["kitchen-complete-v0"].url.rsplit("/", 1)[1])
    if not path.is_file():
        pytest.skip("set D4RL_DATASET_DIR to the folder of D4RL's files")
    data = load_dataset("kitchen-complete-v0")
    assert data["observations"].shape == (3679, 60) and data["terminals"].sum() == 18
    assert set(data["rewards"].tolist()) == {0, 1, 2, 3, 4} and np.abs(data["actions"]).max() < 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TASKS["kitchen-complete-v0"].sha256


def test_demo_data_are_read_from_beside_the_module(tmp_path, monkeypatch):
    columns = rows_of(5, state_dim=17, action_dim=6)
    write(tmp_path / "halfcheetah-demo-v0.hdf5", columns)
    monkeypatch.setattr(files, "DEMO_FILES", tmp_path)
    same(load_dataset("halfcheetah-demo-v0"), plain_loop(columns, 1000))
    bad_input(lambda: load_dataset("maze-demo-v0"), "maze-demo-v0.hdf5", "does not exist")


def test_actions_a_little_beyond_one_are_read_as_d4rl_reads_them(tmp_path):
    path = write(tmp_path / "d.hdf5", rows_of(6) | {"actions": np.full((6, 3), 1.2, np.float32)})
    with pytest.warns(UserWarning, match=r"actions reach 1\.2"):
        assert load_dataset(HOPPER, path)["actions"].max() == np.float32(1.2)


def test_data_of_integers_and_single_flags_are_read(tmp_path):
    columns = rows_of(6) | {"rewards": np.arange(6), "actions": np.ones((6, 3), np.int8)}
    columns["terminals"] = np.array([0, 0, 2, 0, 0, 0])
    data = load_dataset(HOPPER, write(tmp_path / "d.hdf5", columns))
    assert data["rewards"].tolist() == [0, 1, 2, 3, 4] and data["rewards"].dtype == np.float32
    assert data["terminals"].tolist() == [False, False, True, False, False]


def test_a_million_rows_load_in_seconds_and_little_memory(tmp_path):
    code = """
import pathlib, re, sys, time, h5py, d4rl_tasks
def peak():  # ru_maxrss begins at pytest's
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, start = peak(), time.process_time()
assert len(d4rl_tasks.load_dataset("halfcheetah-medium-v2", sys.argv[1])["rewards"]) == 999_000
print(time.process_time() - start, (peak() - before) * 1024)"""
    columns = rows_of(1_000_000, 0, 17, 6)
    size = sum(values.nbytes for values in columns.values())
    path = write(tmp_path / "large.hdf5", columns)
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, memory = map(float, run.stdout.split())
    assert seconds < 5 and memory < 3 * size, (seconds, memory / size)


def test_a_file_that_is_highly_compressed_is_read(tmp_path):
    columns = {name: np.zeros((3_000_000, *values.shape[1:]), "f4") for name, values in rows_of(1).items()}
    path = write(tmp_path / "zeros.hdf5", columns, compression="gzip")
    assert path.stat().st_size < 1e6
    assert len(load_dataset(HOPPER, path)["rewards"]) == 2_997_000


def random_pen_file(draw, st):
    """Draws (columns, HDF5 options) of a pen file with any pattern of episode ends, shapes, types and layout."""
    n, rng = draw(st.integers(2, 260)), np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    ends = st.lists(st.integers(0, n - 1), max_size=12).map(lambda rows: np.isin(np.arange(n), rows))
    columns = {"observations": rng.standard_normal((n, 45)), "actions": rng.uniform(-1, 1, (n, 24)),
               "rewards": rng.standard_normal(n), "terminals": draw(ends)}  # fmt: skip
    if draw(st.booleans()):
        columns["timeouts"] = draw(ends)
    for name in columns:
        flag = name in ("terminals", "timeouts")
        dtypes = ["?", "u1", ">i8", "f4"] if flag else ["f2", "f4", "f8", ">f4"]
        columns[name] = columns[name].astype(draw(st.sampled_from(dtypes)))
        if columns[name].ndim == 1 and draw(st.booleans()):
            columns[name] = columns[name].reshape(n, 1)
    layouts = {}, {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True, "fletcher32": True}
    return columns, draw(st.sampled_from(layouts))


def test_loader_equals_a_plain_loop_on_any_file(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")

    def check(drawn):
        columns, options = drawn
        path = write(tmp_path / "any.hdf5", columns, **options)
        if "timeouts" in columns and columns["timeouts"][:-1].all():
            bad_input(lambda: load_dataset("pen-human-v1", path), "no transition")
        else:
            same(load_dataset("pen-human-v1", path), plain_loop(columns, 100))

    files = hypothesis.strategies.composite(random_pen_file)(hypothesis.strategies)
    same_every_time = hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
    same_every_time(hypothesis.given(files)(check))()


def broken_bytes(whole: bytes, rng: np.random.Generator, count: int):
    """Yields damaged copies: cut off, or bytes, a bit, zeros or a large number written, mostly near the start."""
    for k in range(count):
        end = int(rng.choice([512, 2048, len(whole)]))
        broken, place = bytearray(whole), int(rng.integers(min(end, len(whole)) - 9))
        kind = ("cut", "bytes", "bits", "zeros", "large")[k % 5]
        if kind == "cut":
            del broken[int(rng.integers(len(whole))) :]
        elif kind == "bytes":
            for place in rng.integers(0, min(end, len(whole)), 4):
                broken[place] = rng.integers(256)
        elif kind == "bits":
            broken[place] ^= 1 << int(rng.integers(8))
        else:
            run = bytes(int(rng.integers(1, 400))) if kind == "zeros" else bytes.fromhex("ffffffffffffff7f")
            broken[place : place + len(run)] = run[: len(broken) - place]
        yield bytes(broken)


def wrong_columns() -> dict:
    """By name: the columns of a file, and words that its refusal must have (if none, it may be loaded)."""
    zeros, nan, inf, big = np.zeros, np.zeros((6, 11)), np.zeros(6), np.zeros((6, 11))
    nan[4, 2], inf[3], big[2, 2] = np.nan, -np.inf, 1e300
    without = {name: {k: v for k, v in rows_of(6).items() if k != name} for name in rows_of(6)}
    changes = {
        "narrow states": ("observations", zeros((6, 10)), ["(6, 10)", "(6, 11)", "hopper"]),
        "wide actions": ("actions", zeros((6, 4)), ["(6, 4)", "(6, 3)"]),
        "flat states": ("observations", zeros(66), ["(66,)"]),
        "states of three axes": ("observations", zeros((6, 11, 1)), ["(6, 11, 1)"]),
        "scalar": ("observations", np.float32(3), ["()"]),
        "short actions": ("actions", zeros((5, 3)), ["5 rows", "observations 6"]),
        "short rewards": ("rewards", zeros(5), ["5 rows"]),
        "long timeouts": ("timeouts", zeros(7, bool), ["7 rows"]),
        "two rewards": ("rewards", zeros((6, 2)), ["(6, 2)"]),
        "nan": ("observations", nan, ["of row 4", "not finite"]),
        "inf": ("rewards", inf, ["of row 3", "not finite"]),
        "more than float32": ("observations", big, ["of row 2", "not finite"]),
        "more than float16": ("rewards", np.array([0, 0, 0, np.inf, 0, 0], "f2"), ["of row 3"]),
        "nan terminal": ("terminals", np.array([0, 0, np.nan, 0, 0, 0]), ["of row 2"]),
        "nan timeout": ("timeouts", np.array([0, 0, np.nan, 0, 0, 0]), ["of row 2"]),
        "unscaled actions": ("actions", np.full((6, 3), -30.0), ["reach 30", "[-1, 1]"]),
        **{f"type {t}": ("rewards", zeros(6, t), ["numbers"]) for t in ("S1", "c8", "c16", "V3", [("a", "f4")])},
        **{f"fine {t}": ("rewards", zeros(6, t), []) for t in (">f8", "f2", "g", "u8", ">i2", "?")},
        **{f"flags {t}": ("terminals", np.arange(6).astype(t), []) for t in (">f8", "f2", "g", "u8", ">i2", "?")},
    }  # fmt: skip
    table = {name: (rows_of(6) | {key: values}, words and [key, *words])
             for name, (key, values, words) in changes.items()}  # fmt: skip
    table |= {f"no {name}": (columns, [f"has no {name}"]) for name, columns in without.items()}
    all_ends = rows_of(6) | {"timeouts": np.ones(6, bool)}
    return table | {"nothing": ({}, ["has no observations"]), "all timeouts": (all_ends, ["no transition"]),
                    "no row": (rows_of(0), ["no transition"]),
                    "one row": (rows_of(1), ["no transition"]), "two rows": (rows_of(2), [])}  # fmt: skip


def read_or_refuse(path, *words):
    """The file is refused in a line that names it and has the words; without words it may also be read, as it is."""
    import h5py

    try:
        ours = load_dataset(HOPPER, path)
    except BadInput as error:
        message = str(error)
        assert "\n" not in message and all(word in message for word in (path.name, *words)), message
        return 1
    assert not words, f"read, though {words}"
    with h5py.File(path) as file:
        same(ours, plain_loop({name: file[name][...] for name in {*file} & {*rows_of(0), "timeouts"}}, 1000))
    return 0


@pytest.mark.parametrize("name", wrong_columns())
def test_columns_that_do_not_fit_are_refused(tmp_path, name):
    columns, words = wrong_columns()[name]
    read_or_refuse(write(tmp_path / "d.hdf5", columns), *words)


def test_things_that_are_no_arrays_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    rest = {name: values for name, values in rows_of(6).items() if name != "rewards"}
    for make, word in {
        lambda file: file.create_group("rewards"): "no plain array",
        lambda file: file.create_dataset("rewards", data=h5py.Empty("f4")): "no plain array",
        lambda file: file.create_dataset("rewards", data=["one"] * 6): "numbers",
        lambda file: file.create_dataset("rewards", 6, h5py.vlen_dtype(np.float32)): "numbers",
    }.items():
        with h5py.File(write(tmp_path / "d.hdf5", rest), "a") as file:
            make(file)
        assert read_or_refuse(tmp_path / "d.hdf5", "rewards", word)


def test_other_files_and_paths_are_refused(tmp_path):
    path = tmp_path / "d.hdf5"
    whole = write(path, rows_of(300), compression="gzip").read_bytes()
    for content in (b"", b"not HDF5 at all\n" * 99, whole[:100], b"\x80\x04."):
        path.write_bytes(content)
        assert read_or_refuse(path, "HDF5", "fetch it again")
    bad_input(lambda: load_dataset(HOPPER, tmp_path / "none"), "none does not exist")
    bad_input(lambda: load_dataset(HOPPER, "a\0b"), "does not exist")
    bad_input(lambda: load_dataset(HOPPER, os.devnull), "HDF5")


@pytest.mark.parametrize("options", [
    {}, {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "fletcher32": True}
])  # fmt: skip
def test_damaged_bytes_are_refused_or_harmless(tmp_path, options):
    """A file is cut off, or bytes of it change. Some crash libhdf5 itself (lzf with fletcher32); these do not."""
    path, flags = tmp_path / "d.hdf5", rows_of(200) | {"timeouts": np.arange(200) % 50 == 49}
    whole, refused = write(path, flags, **options).read_bytes(), 0
    for content in broken_bytes(whole, np.random.default_rng(len(options)), 60):
        path.write_bytes(content)
        refused += read_or_refuse(path)
    assert 10 < refused < 60


def test_data_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "checked", lambda *_: np.empty(2**62, np.uint8))  # numpy's own MemoryError
    bad_input(lambda: load_dataset(HOPPER, write(tmp_path / "d.hdf5", rows_of(6))), HOPPER, "memory")


@pytest.mark.parametrize("name", ["h5py", "pooch", "requests", "filelock", "tqdm"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, name, None)
    bad_input(lambda: load_dataset(HOPPER), f"{name} cannot be imported", "pip install -r requirements.txt")
    assert not list(tmp_path.glob("*.hdf5*")) or name != "h5py"  # nothing is fetched that could not be read


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    """A Minari data set of two episodes, made by minari, and its episodes."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, buffers = np.random.default_rng(0), []
    for i, length in enumerate((5, 3)):
        end = np.arange(length) == length - 1
        columns = {
            "observations": rng.standard_normal((length + 1, 11)), "actions": rng.uniform(-1, 1, (length, 3)),
            "rewards": rng.standard_normal(length), "terminations": end & (i == 0), "truncations": end & (i == 1),
        }  # fmt: skip
        buffers.append(EpisodeBuffer(id=i, **columns, infos={}))
    warnings.simplefilter("ignore")  # about environments that it does not know; pytest restores the filters
    minari.create_dataset_from_buffers(
        "test/hopper-v0", buffers, observation_space=Box(-np.inf, np.inf, (11,), np.float64),
        action_space=Box(-1, 1, (3,), np.float64), data_format="hdf5", algorithm_name="none", author="none",
        author_email="none", code_permalink="none",
    )  # fmt: skip
    return tmp_path / "minari" / "test" / "hopper-v0", buffers


def test_minari_folder_is_read(minari_folder):
    folder, (first, second) = minari_folder
    wanted = {
        "observations": np.concatenate([first.observations[:5], second.observations[:3]]),
        "actions": np.concatenate([first.actions, second.actions]),
        "next_observations": np.concatenate([first.observations[1:], second.observations[1:]]),
        "rewards": np.append(first.rewards, second.rewards),
    }
    wanted = {name: values.astype(np.float32) for name, values in wanted.items()}
    wanted["terminals"] = np.array([False] * 4 + [True] + [False] * 3)  # a truncated step is not terminal
    for path in (folder, folder / "data"):
        same(load_dataset(HOPPER, path), wanted)
    bad_input(lambda: load_dataset("walker2d-medium-v2", folder), "episode_0", "(5, 11)", "(5, 17)")


def test_minari_episodes_are_read_in_the_order_of_their_numbers(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        for k in range(12):  # by name episode_10 comes before episode_2
            columns = {"observations": np.zeros((3, 11)), "actions": np.zeros((2, 3)), "rewards": np.full(2, k)}
            for name, values in (columns | {"terminations": np.zeros(2, bool)}).items():
                file[f"episode_{k}/{name}"] = values
    assert load_dataset(HOPPER, tmp_path)["rewards"].tolist() == np.arange(12).repeat(2).tolist()


def test_nothing_that_a_minari_folder_names_is_run(minari_folder, tmp_path):
    """Without spaces in metadata.json, minari makes the environment that env_spec names: here os.system."""
    folder, _ = minari_folder
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    spec = {"id": "Any-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {tmp_path / 'mark'}"},
            "reward_threshold": None, "nondeterministic": False, "max_episode_steps": None,
            "disable_env_checker": True, "additional_wrappers": [], "vector_entry_point": None}  # fmt: skip
    del metadata["observation_space"], metadata["action_space"]
    metadata |= {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec)}
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    assert len(load_dataset(HOPPER, folder)["rewards"]) == 8  # the data themselves are sound
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations"])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_minari_episodes_of_unequal_columns_are_refused(minari_folder, name, wrong):
    """One episode a row short and another a row long, so that the totals agree."""
    import h5py

    folder, _ = minari_folder
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        for k, change in ((0, wrong), (1, -wrong)):
            column = file[f"episode_{k}"][name]
            column.resize(len(column) + change, axis=0)
    bad_input(lambda: load_dataset(HOPPER, folder), "episode_0", "rows, observations")


def test_minari_folders_that_cannot_be_read(minari_folder, tmp_path):
    import h5py

    folder, _ = minari_folder
    file = folder / "data" / "main_data.hdf5"
    with h5py.File(file, "a") as episodes:
        del episodes["episode_1/observations"]
        episodes["episode_1/observations/achieved_goal"] = np.zeros((4, 11))
    bad_input(lambda: load_dataset(HOPPER, folder), "episode_1", "Dict observations are not read")
    with h5py.File(file, "a") as episodes:
        del episodes["episode_1/observations"]
    bad_input(lambda: load_dataset(HOPPER, folder), "episode_1", "has no observations")
    with h5py.File(file, "a") as episodes:
        episodes.move("episode_0", "episode_7")
    bad_input(lambda: load_dataset(HOPPER, folder), "main_data.hdf5", "episode_0")
    h5py.File(file, "w").close()
    bad_input(lambda: load_dataset(HOPPER, folder), "no transition")
    file.write_bytes(b"")
    bad_input(lambda: load_dataset(HOPPER, folder), "main_data.hdf5", "cannot be read")
    file.unlink()  # an arrow data set has folders of episodes instead
    bad_input(lambda: load_dataset(HOPPER, folder), "data/main_data.hdf5", "format hdf5 (arrow is not read)")
    (tmp_path / "empty").mkdir()
    bad_input(lambda: load_dataset(HOPPER, tmp_path / "empty"), "main_data.hdf5 does not exist", "Minari")
