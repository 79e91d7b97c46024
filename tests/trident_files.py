"""Feature files as TRIDENT writes them (mahmoodlab/TRIDENT, trident/IO.py): layout, names, types and attributes."""

from pathlib import Path

import h5py
import numpy as np


def write_features(
    path: Path,
    features: np.ndarray,
    coords: np.ndarray,
    *,
    encoder: str | None = "uni_v1",
    patch_size: int = 256,
    magnifications: tuple[int, int] = (40, 20),
    slide_px: tuple[int, int] | None = None,
    **attributes: object,
) -> Path:
    """Writes one slide's file: resizable datasets in chunks of a row, attributes beside them.

    Args:
        path: the file, `features_ENCODER/SLIDE.h5`.
        features: (N, D).
        coords: upper left corners in level-0 pixels, int64 (N, 2).
        encoder: its name; None: not stated, as by earlier versions.
        patch_size: edge of a tile at the target magnification.
        magnifications: of level 0 and of the tiles.
        slide_px: width and height of level 0; None: not stated, as by earlier versions.
        attributes: of `coords`, in the place of those above; None leaves one out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    source, target = magnifications
    common = {"name": path.stem, "savetodir": str(path.parent)}
    stated: dict[str, object] = {
        "patch_size": patch_size,
        "patch_size_level0": patch_size * source // target,
        "level0_magnification": source,
        "target_magnification": target,
        "overlap": 0,
    }
    if slide_px is not None:
        stated |= {"level0_width": slide_px[0], "level0_height": slide_px[1]}
    of_features = common if encoder is None else common | {"encoder": encoder}
    of_coords = {name: value for name, value in (stated | common | attributes).items() if value is not None}
    with h5py.File(path, "w") as file:
        for name, values, attrs in (("features", features, of_features), ("coords", coords, of_coords)):
            shape = values.shape
            data = file.create_dataset(name, shape, values.dtype, chunks=(1, *shape[1:]), maxshape=(None, *shape[1:]))
            data[:] = values
            data.attrs.update(attrs)
    return path
