"""The environment of maze-demo-v0, the first demo: a point in a maze of crossing corridors, with many ways to the goal.

It is small and needs neither MuJoCo nor OpenGL, so that a first run takes little time.
"""

import gymnasium
import numpy as np

MAP = (  # S is the start, G the goal, # a wall; row 0 is drawn at the top, and a cell is one unit wide
    "###########",
    "#........G#",
    "#.#.#.#.#.#",
    "#.........#",
    "#.#.#.#.#.#",
    "#....S....#",
    "#.#.#.#.#.#",
    "#.........#",
    "#.#.#.#.#.#",
    "#.........#",
    "###########",
)
CELLS = np.array([list(row) for row in MAP])  # (rows, columns) of characters
CENTRE = np.array(CELLS.shape[::-1]) / 2  # of the maze, from its corner at the top left
REACH, SUBSTEPS = 2.0, 20  # the longest move along an axis in one step, in units; the parts in which it is made


def content(place: np.ndarray) -> str:
    """What is in the cell of a place (x, y), in units from the centre of the maze; y points down."""
    x, y = place + CENTRE
    return CELLS[int(y), int(x)]


def centre_of(mark: str) -> np.ndarray:
    """The place in the middle of the cell with this content."""
    row, column = np.argwhere(mark == CELLS)[0]
    return np.array([column, row]) + 0.5 - CENTRE


def move(place: np.ndarray, action: np.ndarray) -> list[np.ndarray]:
    """The places that the point passes in one step, SUBSTEPS + 1 with the first."""
    part, places = REACH / SUBSTEPS * np.clip(np.asarray(action, np.float64), -1, 1), [place]
    for _ in range(SUBSTEPS):
        place = place.copy()
        for axis in range(2):  # a wall stops the motion across it; the motion along it goes on
            moved = place.copy()
            moved[axis] += part[axis]
            if content(moved) != "#":
                place = moved
        places.append(place)
    return places


class Maze(gymnasium.Env):
    """States are the place (x, y) as in `content`, actions a move (2,) in [-1, 1] times REACH, which walls stop.

    Each step has reward -1, and the episode ends in the goal's cell.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (gymnasium's own form)

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = centre_of("S") + self.np_random.uniform(-0.3, 0.3, 2)
        return self.place.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.place = move(self.place, action)[-1]
        return self.place.copy(), -1.0, content(self.place) == "G", False, {}

    def render(self) -> np.ndarray:
        """The maze from above, (rows, columns, 3) uint8 of 40 pixels per unit: walls, the goal and the point."""
        colours = np.full((*CELLS.shape, 3), 255, np.uint8)
        colours[CELLS == "#"], colours[CELLS == "G"] = 90, (60, 180, 75)
        picture = colours.repeat(40, 0).repeat(40, 1)
        y, x = (np.indices(picture.shape[:2]) + 0.5) / 40
        picture[np.hypot(*(np.stack([x, y], -1) - CENTRE - self.place).transpose(2, 0, 1)) < 0.2] = (0, 90, 200)
        return picture
