import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_xdist_auto_num_workers() -> int:
    return 0  # what is timed has the machine to itself


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--official", type=Path, help="checkout of the official implementation, timed in the same process")
    parser.addoption("--flow-rl", type=Path, help="checkout of typoverflow/flow-rl, likewise")
