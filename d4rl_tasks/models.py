"""MuJoCo's models of the tasks: those of gymnasium and gymnasium_robotics, changed to be D4RL's.

Bodies of HalfCheetah, Hopper, Walker2d and AntMaze have other masses there, for MuJoCo before 2.1.2 gave a capsule the
mass of a cylinder longer by half its radius at both ends. The ant has its own time step, contacts, motors and mazes,
the pen other motors, the kitchen one collision less.
MuJoCo 3.2.6 collides bodies as D4RL's 2.1.0 did; 3.2.7 no longer does so at antmaze's walls, 3.3 in pen and kitchen.
"""

import functools
import os
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np

from d4rl_tasks.tasks import BadInput, package

try:
    import mujoco
except Exception:  # it imports the OpenGL library that MUJOCO_GL names, of which simulations need none
    with mock.patch.dict(os.environ, MUJOCO_GL="disable"):  # rendering will read it as it was
        mujoco = package("mujoco")
if mujoco.__version__ != "3.2.6":
    raise BadInput(f"mujoco {mujoco.__version__} does not move as D4RL's: pip install mujoco==3.2.6")


@functools.cache
def model_of(family: str, maze: str) -> mujoco.MjModel:
    """The model of D4RL's task, compiled by today's MuJoCo; environments share it. maze is empty but for antmaze."""
    if family not in ("pen", "kitchen"):
        name = {"halfcheetah": "half_cheetah", "antmaze": "ant"}.get(family, family)
        root = ET.parse(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / f"{name}.xml").getroot()
        if family == "antmaze":
            _build_maze(root, maze)
        _weigh_capsules(root)
        return mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))
    file = "adroit_hand/adroit_pen.xml" if family == "pen" else "kitchen_franka/kitchen_assets/kitchen_env_model.xml"
    robotics = find_spec("gymnasium_robotics")  # not imported, for it warns of its own environments
    if robotics is None:
        raise BadInput("gymnasium_robotics is not installed: pip install -r requirements.txt")
    spec = mujoco.MjSpec.from_file(str(Path(robotics.origin).parent / "envs" / "assets" / file))
    if family == "pen":
        spec.find_body("target").mocap = True  # its orientation is then part of the data, not of the shared model
        model = spec.compile()
        for first, last, gain in (("A_WRJ1", "A_WRJ0", 10), ("A_FFJ3", "A_THJ0", 1)):
            motors = slice(model.actuator(first).id, model.actuator(last).id + 1)
            model.actuator_gainprm[motors, :3] = gain, 0, 0
            model.actuator_biasprm[motors, :3] = 0, -gain, 0
    else:
        model = spec.compile()
        stand = np.isclose(model.geom_size[:, :2], [0.12, 0.9]).all(axis=1)  # the robot's: only drawn in d4rl
        model.geom_contype[stand] = model.geom_conaffinity[stand] = 0
    return model


def _weigh_capsules(root: ET.Element) -> None:
    """Adds to each capsule the longer cylinder that MuJoCo before 2.1.2 weighed in its place.

    The cylinder collides with nothing, is not drawn (group 3) and has all the mass and inertia; the capsule has none.
    """
    for body in root.iter("body"):
        for capsule in [geom for geom in body.findall("geom") if geom.get("type") == "capsule"]:
            cylinder = ET.SubElement(body, "geom", {key: x for key, x in capsule.items() if key != "name"})
            cylinder.attrib.update(type="cylinder", contype="0", conaffinity="0", group="3")
            radius, *half = map(float, capsule.get("size").split())
            if half:
                cylinder.set("size", f"{radius!r} {half[0] + radius / 2!r}")
            else:
                ends = np.array(capsule.get("fromto").split(), float).reshape(2, 3)
                longer = np.diff(ends, axis=0) / np.linalg.norm(np.diff(ends, axis=0)) * radius / 2
                cylinder.set("fromto", " ".join(map(repr, (ends + [[-1], [1]] * longer).ravel().tolist())))
            capsule.set("mass", "0")


def _build_maze(root: ET.Element, maze: str) -> None:
    """Turns gymnasium's ant into d4rl's and builds the walls of its maze around it."""
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
    for motor in root.find("actuator"):
        motor.attrib.update(gear="1", ctrlrange="-30 30")
    for x, y in cells(maze, "#"):
        wall = {"type": "box", "contype": "1", "conaffinity": "1", "size": "2 2 1", "rgba": ".7 .5 .3 1"}
        ET.SubElement(root.find("worldbody"), "geom", wall, pos=f"{x} {y} 1")


MAZES = {  # the ant starts in the first free cell, at the origin, its goal is G; cells are 4 wide
    "umaze": "##### #...# ###.# #G..# #####",
    "medium": "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
}  # fmt: skip


def cells(maze: str, kind: str) -> list[tuple[float, float]]:
    """The centers of a maze's cells of one kind."""
    rows = enumerate(MAZES[maze].split())
    return [(4.0 * (x - 1), 4.0 * (y - 1)) for y, row in rows for x, cell in enumerate(row) if cell == kind]
