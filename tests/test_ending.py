"""How a run ends: signals at any moment, streams that break, packages and memory that lack, compilers that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import (
    ROOT,
    assert_same_end,
    bad_input,
    flags,
    metrics,
    read_torch,
    run_left_alone,  # noqa: F401, a fixture
    tiny_args,
    told,
)

import compiling
import dql
import fast_sampler
from housekeeping import curves, ending


@pytest.mark.parametrize("error, code, says", [
    (ending.Diverged("gone"), 3, "gone"), (ending.Stopped(signal.SIGTERM, "goes on"), 143, "goes on"),
    (ending.Stopped(signal.SIGINT, "goes on"), 130, "goes on"), (KeyboardInterrupt(), 130, "interrupted"),
    (ending.Stopped(signal.SIGHUP, "goes on"), 129, "goes on"), (dql.BadInput("a\nb"), 2, "a b"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    (MemoryError(), 2, "out of memory"), (FileNotFoundError(2, "No usable temporary directory"), 2, "[Errno 2] No us"),
    (ModuleNotFoundError("No module named 'a.b'", name="a.b"), 2, "a is not installed: pip install a"),
])  # fmt: skip
def test_exit_codes(error, code, says, capsys):
    with pytest.raises(SystemExit) as stop:
        ending.run_main("dql.py", lambda: (_ for _ in ()).throw(error))
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(f"dql.py: {says}") and err.count("\n") == 1


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        ending.run_main("dql.py", lambda: 1 / 0)


# ----------------------------------------------------------------- signals


def handles(process: subprocess.Popen, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signum - 1) & 1)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def unignored() -> None:
    """Undoes what background jobs and nohup begin with: a run ignores what its parent ignores."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@contextmanager
def started(args: dql.Args, *words: str, **options) -> Iterator[subprocess.Popen]:
    """The process of such a run, which ends with the block; it ignores no signals."""
    command = [sys.executable, str(ROOT / "dql.py"), *flags(args), "--no-compile", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, text=True, env=env, preexec_fn=unignored, **options) as process:
        try:
            yield process
        finally:
            process.kill()


procfs_wanted = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")


@procfs_wanted
@pytest.mark.parametrize("signum, delay", [(signal.SIGINT, 0.0), (signal.SIGINT, 1.0), (signal.SIGHUP, 2.0)])
def test_a_signal_in_the_first_seconds_is_one_line(signum, delay, tmp_path):
    """While modules load, data are read and the first steps are tried."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(tiny_args(tmp_path, num_updates=10**6), **pipes) as process:
        wait_for(lambda: handles(process, signal.SIGTERM), process)
        time.sleep(delay)
        process.send_signal(signum)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum and len(told(err)) == 1, err
    assert told(err)[0].startswith("dql.py: stopped " if delay else f"dql.py: stopped by {signum.name};")


@procfs_wanted
@pytest.mark.parametrize("signum, closed", [(signal.SIGHUP, False), (signal.SIGINT, True)])
def test_a_signal_in_training_leaves_a_checkpoint(signum, closed, tmp_path):
    """Also when what reads the run's output, tee say, is gone by then."""
    args = tiny_args(tmp_path, num_updates=10**6, eval_every=10**6)
    with started(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(lambda: list(args.runs_dir.glob("*/metrics.csv")), process)
        (folder,) = args.runs_dir.iterdir()
        assert not (folder / "checkpoint.pt").exists()
        if closed:
            process.stdout.close()
        process.send_signal(signum)
        out = "" if closed else process.stdout.read()
        process.wait(60)
    assert process.returncode == 128 + signum
    step = read_torch(folder)["progress"]["step"]
    assert step >= 5 and len(metrics(folder)) == step // 5
    where = f"dql.py: stopped at update {step:,} of 1,000,000"
    assert closed or told(out)[-1] == f"{where}; to go on: python dql.py --resume {folder}"


def test_ignored_signals_stay_ignored_and_a_second_one_ends_at_once():
    """nohup ignores SIGHUP. A signal that is sent twice at once, as by a closing terminal, is one."""
    script = """if True:
        import os, signal, time
        from housekeeping import ending
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        ending.begin("x.py")
        with ending.held_signals() as check:
            os.kill(os.getpid(), signal.SIGHUP)
            check()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("held", flush=True)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
        print("never")
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "held\n")
    assert done.stderr == "x.py: stopped by SIGINT; --resume continues a run that had started\n"


def test_signals_are_held_in_the_main_thread_alone(tmp_path):
    """In another thread Python cannot handle signals: a run in one of a notebook's threads trains all the same."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        assert pool.submit(dql.train, tiny_args(tmp_path, num_updates=2)).result()["num_updates"] == 2


# ----------------------------------------------------------------- streams


def test_a_run_goes_on_without_a_reader(tmp_path):
    """`python -I dql.py ... 2>&1 | head -1`; -I also leaves the script's folder out of sys.path."""
    args = tiny_args(tmp_path, num_updates=4)
    words = [sys.executable, "-I", str(ROOT / "dql.py"), *flags(args)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert "updates 0 to 4" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
    (folder,) = args.runs_dir.iterdir()
    assert json.loads((folder / "summary.json").read_text())["num_updates"] == 4


def test_a_report_in_ascii_without_stderr(tmp_path):
    """`PYTHONIOENCODING=ascii python dql.py ... 2>&-`, as in cron's jobs."""
    args = tiny_args(tmp_path, num_updates=4)
    words = ["bash", "-c", 'exec "$@" 2>&-', "bash", sys.executable, str(ROOT / "dql.py"), *flags(args)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and re.search(r"last +-?\d+\.\d \+- \d+\.\d \(3 episodes", done.stdout), done.stdout


def test_processes_that_libraries_start_have_streams():
    """Although this one began without: GLFW's bindings load its library in a process that needs stderr."""
    script = """if True:
        import subprocess, sys
        from housekeeping import ending
        ending.begin("x.py")
        child = "import sys; sys.exit(sys.stdin is None or sys.stderr is None)"
        sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
    """
    words = ["bash", "-c", 'exec "$@" 2>&- <&-', "bash", sys.executable, "-c", script]
    assert subprocess.run(words, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("words", [">/dev/full 2>&1", ">&- 2>&-", "| head -c 1"])
def test_broken_streams_change_no_exit_code(words):
    """A full disk, closed streams, a reader that has gone: --help ends with 0, and complaints with 2."""
    for flag, code in (("--help", 0), ("--bogus", 2)):
        line = f'"$0" dql.py {flag} {words}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, (flag, done)


# ----------------------------------------------------------------- what is missing or broken


def test_a_missing_package_is_named():
    """In a process of its own, where none of them has been imported."""
    script = """if True:
        import pathlib, sys, tempfile
        sys.path.insert(0, "tests")
        import runs
        from housekeeping.ending import run_main
        args = runs.tiny_args(pathlib.Path(tempfile.mkdtemp()), num_updates=2)
        for name in ("filelock", "tensorboard", "tqdm"):
            module, sys.modules[name] = sys.modules.get(name), None
            try:
                run_main("dql.py", lambda: runs.dql.train(args))
            except SystemExit as stop:
                assert stop.code == 2 and list(args.runs_dir.iterdir()) == [], (name, stop.code)
            del sys.modules[name]
            if module:
                sys.modules[name] = module
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    lines = [f"dql.py: {name} is not installed: pip install {name}" for name in ("filelock", "tensorboard", "tqdm")]
    assert done.returncode == 0 and told(done.stderr) == lines, done.stderr


def test_no_login_leaves_nothing(tmp_path, monkeypatch):
    """Weights & Biases makes a folder, where it is told to, before it finds that nobody is logged in."""

    def init(dir=".", **_):
        Path(dir, "wandb").mkdir()
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.chdir(tmp_path)
    args = tiny_args(tmp_path, track=True)
    bad_input(lambda: dql.train(args), "--track: api_key not configured")
    assert list(args.runs_dir.iterdir()) == [] and not Path("wandb").exists()


def test_pictures_never_cost_a_run(run_left_alone, monkeypatch, capsys):  # noqa: F811
    """matplotlib may be missing, or broken by its settings in any way: that is told at the start, and no more."""
    args, whole = run_left_alone(1)

    def broken(*_, **__):
        raise RuntimeError("Key backend: 'module://matplotlib_inline' is not a valid value\nfor backend")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        folders = [Path(dql.train(args)["folder"])]
    with monkeypatch.context() as patch:
        patch.setattr(curves, "write_curves", broken)
        folders.append(Path(dql.train(args)["folder"]))
    lines = told(capsys.readouterr().err)
    assert len(lines) == 2 and all(line.startswith("warning: no curve.png will be drawn: ") for line in lines), lines
    for folder in folders:
        assert not (folder / "curve.png").exists()
        assert_same_end(whole, folder)


@pytest.fixture
def broken_compiler(monkeypatch):
    """Whatever is compiled fails when it is first called, as torch.compile does, and as loading damaged code does."""

    def compiled(function, device):
        def broken(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a hundred lines more")

        return broken

    monkeypatch.setattr(compiling, "compiled", compiled)


def test_where_compiling_fails_a_run_is_eager(run_left_alone, broken_compiler, monkeypatch, capsys):  # noqa: F811
    """With one warning, and the same numbers; but where --compile was asked for, it is an error."""
    args, whole = run_left_alone(1)
    with monkeypatch.context() as patch:
        choose_path = fast_sampler.choose_path
        patch.setattr(fast_sampler, "choose_path", lambda *of: dql.replace(choose_path(*of), compile=True))
        capsys.readouterr()
        folder = Path(dql.train(args)["folder"])
    lines = told(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith("warning: compiling fails here (InvalidCxxCompiler: No working")
    assert_same_end(whole, folder)
    assert dql.read_args(folder).compile is False, "where the compiler works again, a resumed run is eager too"
    before = set(args.runs_dir.iterdir())
    monkeypatch.setattr(fast_sampler, "lacks_to_compile", lambda on_gpu: "")
    bad_input(lambda: dql.train(dql.replace(args, compile=True)), "--compile fails here", "give --no-compile")
    assert set(args.runs_dir.iterdir()) == before


def test_compiled_code_is_kept_in_a_private_folder(tmp_path, monkeypatch):
    """What is found in the cache is run: another user must not have put it there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(compiling.private_folder())
    assert folder == tmp_path / "cache" / "diffusion-ql" and folder.stat().st_mode & 0o777 == 0o700
    assert compiling.private_folder() == str(folder)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)  # as if it were another's
    other = Path(compiling.private_folder())
    assert other != folder and other.stat().st_mode & 0o777 == 0o700
    other.rmdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    other = Path(compiling.private_folder())
    assert other.is_dir()
    other.rmdir()


@pytest.mark.skipif(bool(fast_sampler.lacks_to_compile(False)), reason="no compiler")
def test_compiled_code_goes_there(tmp_path, monkeypatch):
    """Although torch has chosen a folder of /tmp when it was imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compiling.default_cache_dir())
    compiling.compiled(lambda x: (3 * x).tanh().cumsum(0), torch.device("cpu"))(torch.ones(7))
    assert list((tmp_path / "diffusion-ql").rglob("*.so"))
