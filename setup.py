"""The dependencies of `pip install .`: the pins of requirements.txt, without those of tests and linter."""

from pathlib import Path

from setuptools import setup

lines = Path(__file__).with_name("requirements.txt").read_text().split("# the tests")[0].splitlines()
setup(install_requires=[line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()])
