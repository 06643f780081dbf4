"""D4RL takes the next row of a file for the next observation: a file that says otherwise is refused."""

from typing import Any

import numpy as np

from d4rl_tasks.tasks import BadInput

AT_ONCE = 2**16  # rows


def check_next_rows(column: Any, rows: dict[str, np.ndarray], kept: np.ndarray, is_published: bool, path: Any) -> None:
    """Raises BadInput if the file's next_observations differ from the rows after, as in a file that was shuffled.

    column is h5py's data set of them, (n, S), or anything else, which is not looked at, for D4RL never reads it. kept
    (n - 1,) marks the rows that are transitions; after a terminal one, nothing follows. Of a published file, on which
    the paper's results were trained, one such row in 100 may differ: an end that is not marked.
    """
    states = rows["observations"]
    if getattr(column, "shape", None) != states.shape or column.dtype.kind not in "biuf":
        return
    followed, wrong = kept & ~rows["terminals"][:-1], []
    for first in range(0, len(followed), AT_ONCE):
        part = slice(first, min(first + AT_ONCE, len(followed)))
        near = np.isclose(column[part], states[part.start + 1 : part.stop + 1], rtol=1e-4, atol=1e-4).all(axis=1)
        wrong.extend(np.flatnonzero(followed[part] & ~near) + first)
    if len(wrong) > (followed.sum() / 100 if is_published else 0):
        raise BadInput(
            f"{path}: next_observations of {len(wrong):,} rows (the first is row {wrong[0]}) are not the row after, "
            "which D4RL's rule takes: write the rows in order, with timeouts where an episode is cut off, or leave out "
            "next_observations if they are in order"
        )
