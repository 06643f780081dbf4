"""How a program ends: signals, streams that can no longer be written, and every error as one line with an exit code."""

import codecs
import os
import signal
import sys
import threading
import time
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
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that a stream's encoding lacks: ASCII in cron's jobs, say."""
    text = error.object[error.start : error.end].replace("±", "+-")
    return text.encode("ascii", "backslashreplace").decode(), error.end


def begin(program: str) -> None:
    """Called before anything slow is imported: from now on no signal and no broken stream leaves a traceback.

    A signal ends the process at once; while a run trains, `held_signals` takes over.
    """
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # after 2>&- a data file would get stderr's number
            os.set_inheritable(number, True)
        os.close(number)
    codecs.register_error("in_ascii", in_ascii)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115
        with suppress(OSError):  # of a file that has become a pipe
            stream.reconfigure(errors="in_ascii")
        setattr(sys, name, Stream(stream))

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
        return
    except KeyboardInterrupt:
        line, code = "interrupted; --resume continues a run that had started", 130
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).split(".")[0]
        line, code = f"{package} is not installed: pip install {package}", 2
    except Exception as error:
        line, code = str(error), getattr(error, "exit_code", 2)
        if out_of_memory(error):
            from d4rl_tasks import reason  # not above, where it would take time before signals are handled

            line = f"out of memory ({reason(error)}): try a smaller --batch-size or --num-seeds"
        elif not hasattr(error, "exit_code") and not isinstance(error, OSError):
            raise  # a fault of the program's own
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a CPU or a GPU: torch raises RuntimeErrors that say so."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))


@contextmanager
def held_signals() -> Iterator[Callable[[], None]]:
    """Holds signals back; yields a function that raises Stopped once one has arrived.

    Another that comes more than a second later has its usual effect: a closing terminal sends SIGHUP twice at once.
    """
    arrived, before = [], {}

    def note(signum: int, _: object) -> None:
        arrived.append((signum, time.monotonic()))
        if arrived[-1][1] - arrived[0][1] > 1:
            release()
            signal.raise_signal(signum)

    def release() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def check() -> None:
        if arrived:
            raise Stopped(arrived[0][0])

    if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
        for signum in SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # ignored, or not Python's
                before[signum] = signal.signal(signum, note)
    try:
        yield check
    finally:
        release()
