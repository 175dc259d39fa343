"""What in a picture is ground: the colour of its border, as far as it reaches inwards."""

from __future__ import annotations

import numpy as np

from stable_diffusion.data.cache import Array

TOLERANCE = 5
"""Levels of 255 by which a channel of the ground may differ from its colour: it hardly does more after an autoencoder's
round trip, and the shades of a white thing on white do."""


def colours(pictures: Array) -> Array:
    """The median colour of each picture's border, for uint8 pictures ``n h w 3``: ``n 3``."""
    edges = [pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]]
    return np.median(np.concatenate(edges, axis=1), axis=1).round().astype(np.uint8)


def ground(pictures: Array, colour: Array) -> Array:
    """Where uint8 pictures ``n h w 3`` show ground: pixels of its colour that others of them join to the border.

    So the white of an eye is not ground, nor is a white belly inside its outline.

    Args:
        pictures: of one size.
        colour: of each picture's ground, ``n 3``.
    """
    near = np.abs(pictures.astype(np.int16) - colour[:, None, None]).max(3) <= TOLERANCE
    free = np.packbits(np.moveaxis(near, 0, 2), axis=2)  # h w, and a bit for each picture
    reached = np.zeros_like(free)
    for edge in (0, -1):
        reached[edge], reached[:, edge] = free[edge], free[:, edge]
    before = np.zeros_like(free)
    while (before != reached).any():
        before = reached.copy()
        for axis in (0, 1):
            # Views, so that each of the four sweeps writes into `reached`.
            for flow, room in ((reached, free), (np.flip(reached, axis), np.flip(free, axis))):
                flow, room = np.moveaxis(flow, axis, 0), np.moveaxis(room, axis, 0)
                for i in range(1, len(flow)):
                    flow[i] |= flow[i - 1] & room[i]
    return np.moveaxis(np.unpackbits(reached, axis=2, count=len(pictures)), 2, 0).astype(bool)
