"""Downloads of data files, from D4RL's server or the mirror; one process downloads and the others wait for it."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from d4rl_tasks.tasks import BadInput, package, reason

MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"  # the same files by the same names, in one folder
TIMEOUT = (2.0, 20.0)  # seconds to connect to one address, and seconds without a byte
PAUSE = 1.0  # seconds until a server is asked again


def download(url: str, path: Path, sha256: str, check: Callable[[Path], object], mirrored: bool = True) -> None:
    """Fetches url, or else the mirror's file of that name, to path, where only a whole and checked file appears.

    sha256 is empty where it is unknown; check(file) raises BadInput if the contents are wrong.
    Raises: BadInput with the reasons and the other ways to provide the data.
    """
    filelock = package("filelock")
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process is downloading {path.name}: waiting for it", file=sys.stderr)
            held = lock.acquire()
        with held:  # another process may have brought it
            urls = [url, MIRROR + path.name] if mirrored else [url]
            failed = None if path.exists() else _fetch(urls, path, sha256, check)
    except (OSError, NotImplementedError) as error:  # the folder, the disk, a file system without locks
        failed = reason(error)
    if failed:
        raise BadInput(f"no {path.name} ({failed}): put {url} at {path}, or give another file with --dataset-path")


def _fetch(urls: list[str], path: Path, sha256: str, check: Callable[[Path], object]) -> str | None:
    """Tries the URLs in turn, and once more those whose server answered; returns the reasons if all fail.

    Each attempt begins at the first byte, so that no file is ever pieced together of two.
    pooch.retrieve itself knows no mirror, renames before the contents are checked, and leaves the file readable by its
    owner alone; so this is its downloader only.
    """
    pooch, requests, urllib3, _ = map(package, ("pooch", "requests", "urllib3", "tqdm"))  # pooch's progress bar
    fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=2**16, timeout=TIMEOUT)
    part, reasons = path.with_name(path.name + ".part"), {}
    for attempt in range(2):
        time.sleep(PAUSE * attempt if urls else 0)
        for url in list(urls):
            print(f"downloading {url}", file=sys.stderr)
            try:
                fetch(url, str(part), None)
                if sha256 and pooch.file_hash(str(part)) != sha256:
                    raise BadInput(f"the sha256 of its file is {pooch.file_hash(str(part))} instead of {sha256}")
                with contextlib.suppress(MemoryError):  # it is whole, and whoever loads it will be told
                    check(part)
                os.replace(part, path)
                return None
            except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
                reasons[url] = reason(error).rsplit("Caused by ", 1)[-1][:300]  # requests tells much else
                if isinstance(error, (requests.ConnectionError, requests.Timeout)):  # not reached, or it hangs
                    urls.remove(url)
            finally:
                part.unlink(missing_ok=True)
    return "; ".join(f"{url}: {why}" for url, why in reasons.items())
