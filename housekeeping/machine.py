"""The machine: devices, processors, memory, and the versions that a score depends on."""

import functools
import importlib.metadata
import math
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from d4rl_tasks import BadInput, reason


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one. Raises BadInput if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"--device is {name}, it must be auto, cpu, cuda, or cuda:1 and so on")
    try:
        return torch.zeros((), device=name).device  # "cuda" becomes "cuda:0", which is there
    except Exception as error:  # torch raises several kinds here
        raise BadInput(f"--device {name} cannot be used: {reason(error)}") from None


def check_memory(flag: str, value: int, bytes_each: int, device: torch.device) -> None:
    """Raises BadInput if value things of so many bytes cannot fit: rather than minutes of swapping, and a kill.

    Systems other than Linux do not tell what is free.
    """
    found = re.search(r"MemAvailable:\s*(\d+)", path.read_text()) if (path := Path("/proc/meminfo")).exists() else None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(found[1]) * 1024 if found else math.inf
    if (needed := value * bytes_each) > free:
        raise BadInput(f"{flag} {value:,} needs {needed / 2**30:,.1f} GiB of memory at least, and {free / 2**30:,.1f} "
                       f"GiB are free: at most {free // bytes_each:,} fit")  # fmt: skip


@functools.cache
def cpuinfo() -> str:
    """What the system says of the processor."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def processor_vendor() -> str:
    """The processor's vendor: "AMD", "Intel" or "other"."""
    return "AMD" if "AuthenticAMD" in cpuinfo() else "Intel" if "GenuineIntel" in cpuinfo() else "other"


def instructions() -> str:
    """The processor's vendor and vector instructions, such as "AMD AVX512"; compiling.py chooses products by them.

    Zen 4, the one family of AMD's with AVX-512 before Zen 5 (26), executes it in halves: "AMD AVX512 in halves".
    """
    found = f"{processor_vendor()} {torch.backends.cpu.get_cpu_capability()}"
    family = re.search(r"family\s*:?\s*(\d+)", cpuinfo(), re.IGNORECASE)
    in_halves = found == "AMD AVX512" and family and int(family[1]) < 26
    return f"{found} in halves" if in_halves else found


@functools.cache
def versions(device: torch.device) -> dict[str, str | int]:
    """What a score depends on besides arguments and data: versions, threads, instructions and, on a GPU, which one."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    found["instructions"] = instructions()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["torch"] = str(torch.__version__)  # with its build, which the metadata of PyPI's wheels leave out
    for package in ("numpy", "gymnasium", "gymnasium-robotics", "mujoco", "gym", "d4rl", "free-mujoco-py"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of this program's working tree, "-dirty" if files differ from it; None where there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside another project's working tree
        return None
    with suppress(OSError, subprocess.SubprocessError):
        words = ("git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
