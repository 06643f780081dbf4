"""The error that a user can fix, and packages that may be missing."""

from __future__ import annotations

import importlib
import types


class BadInput(ValueError):
    """An error that the user can fix; the message is one line that says what is wrong and how to fix it."""

    exit_code = 2

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) < 2000 else f"{line[:1000]} [...] {line[-900:]}")


def reason(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def package(name: str) -> types.ModuleType:
    """Imports a package of requirements.txt. Raises BadInput if it is missing or cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{name} cannot be imported ({reason(error)}): pip install -r requirements.txt") from None
