"""The command dql, which `pip install .` makes."""

import runpy


def dql() -> None:
    """As `python dql.py`: the module sees to signals before anything slow is imported."""
    runpy.run_module("dql", run_name="__main__", alter_sys=True)
