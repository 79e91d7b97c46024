"""Wide tiles in plain NumPy: all pixels of an image on a plane of background, resampled by their areas."""

import numpy as np

BEYOND = 640
"""Pixels of background around the image: more than any tile of the tests extends beyond it."""


def weights(start, size, scale, length):
    """Each output pixel's weights, float64 (size, length): a triangle twice as wide as it, over whole pixels."""
    centre = start + (np.arange(size)[:, None] + 0.5) * scale
    triangle = np.clip(1 - np.abs(np.arange(length)[None] + 0.5 - centre) / max(scale, 1), 0, None)
    return triangle / triangle.sum(axis=1, keepdims=True)


def reference(image, left, top, size, scale):
    """Returns the wide tile at a corner in pixels of the image, float64 (size, size, 3)."""
    plane = np.pad(image.astype(float), ((BEYOND, BEYOND), (BEYOND, BEYOND), (0, 0)), constant_values=240)
    rows, columns = (
        weights(start + BEYOND, size, scale, length)
        for start, length in ((top, plane.shape[0]), (left, plane.shape[1]))
    )
    return np.einsum("iy,yxc,jx->ijc", rows, plane, columns, optimize=True)
