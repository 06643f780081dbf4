"""How a program ends: signals, streams that can no longer be written, and every error as one line with an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """A signal arrived while a run trained; the message says where the run stands."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum


class Diverged(Exception):
    """A loss or a parameter is no longer a finite number; the message says which, when, and what is left."""

    exit_code = 3


class Stream:
    """stdout or stderr, without which a run goes on: what cannot be written, to a closed pipe say, is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # PYTHONIOENCODING=ascii, as in cron's jobs
                self.stream.write(text.replace("±", "+-").encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def begin(program: str) -> None:
    """Called before anything slow is imported: from now on a signal or a broken stream ends no program untidily.

    A signal ends the process at once with one line. Nothing is lost: files are written beside and renamed, and while a
    run trains `held_signals` takes over.
    """
    with suppress(OSError):
        while os.open(os.devnull, os.O_RDWR) <= 2:  # after 2>&- a data file would get stderr's number
            pass
    for name in ("stdout", "stderr"):
        setattr(sys, name, Stream(getattr(sys, name) or Path(os.devnull).open("w")))  # noqa: SIM115

    def leave(signum: int, _: object) -> None:
        line = f"{program}: stopped by {signal.Signals(signum).name}; --resume continues a run that had started\n"
        with suppress(OSError):
            os.write(2, line.encode())
        os._exit(128 + signum)  # an exception could be swallowed by a library, or print its traceback

    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(signum, leave)


def run_main(program: str, main: Callable[[], object]) -> None:
    """Runs a program; what a user can mend becomes one line on stderr, and the exit code 2 or the error's own."""
    try:
        main()
    except KeyboardInterrupt:
        line, code = "interrupted; --resume continues a run that had started", 130
    except ModuleNotFoundError as error:
        line, code = f"{error.name} is not installed: pip install -r requirements.txt", 2
    except Exception as error:
        line, code = str(error), getattr(error, "exit_code", 2)
        if out_of_memory(error):
            line = f"out of memory ({first_line(error)}): try a smaller --batch-size or --num-seeds"
        elif not hasattr(error, "exit_code") and not isinstance(error, OSError):
            raise  # a fault of the program's own
    else:
        return
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a CPU or a GPU: torch raises RuntimeErrors that say so."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Holds signals back; yields a function that raises Stopped once one has arrived. A second has its usual
    effect. Only the main thread gets signals: in another nothing is held back.
    """
    arrived: list[int] = []
    before = {}

    def note(signum: int, _: object) -> None:
        arrived.append(signum)
        release()

    def release() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def check() -> None:
        if arrived:
            raise Stopped(arrived[0])

    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            handler = signal.getsignal(signum)
            if handler not in (signal.SIG_IGN, None):  # ignored, or not Python's
                before[signum] = handler
                signal.signal(signum, note)
    try:
        yield check
    finally:
        release()
