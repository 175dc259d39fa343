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
    apart = np.abs(pictures.astype(np.int16) - colour[:, None, None]).max(3)
    near: Array = apart <= TOLERANCE
    reached = np.zeros_like(near)
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        reached[edge] = near[edge]
    before = -1
    while before != (before := int(reached.sum())):
        for axis in (1, 2):
            # Views, so that each of the four sweeps writes into `reached`.
            flow, free = np.moveaxis(reached, axis, 0), np.moveaxis(near, axis, 0)
            for order in (range(1, len(flow)), range(len(flow) - 2, -1, -1)):
                step = -1 if order.step > 0 else 1
                for i in order:
                    flow[i] |= flow[i + step] & free[i]
    return reached
