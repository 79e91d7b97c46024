"""Slide files of a smooth colour field: pyramids and plain images."""

import numpy as np
import tifffile
from PIL import Image

TILED = {"tile": (128, 128), "photometric": "rgb"}
UM = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
PLANES = {"tile": (128, 128), "photometric": "minisblack"}


def texture(height=700, width=900, seed=0):
    """A smooth colour field: resampling it hardly changes it, shifting it does."""
    y, x = np.mgrid[:height, :width] + 0.5
    waves = [128 + 100 * np.sin(x / (29 + 7 * c) + c) * np.cos(y / (37 + 5 * c) + seed) for c in range(3)]
    return np.stack(waves, axis=2).round().astype(np.uint8)


def write_pyramid(path, image, num_levels=3, mpp=0.5, **options):
    """A tiled TIFF whose levels are block means; lossless, so that pixels can be compared exactly."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(num_levels):
            step = 2**level
            height, width = image.shape[0] // step, image.shape[1] // step
            blocks = image[: height * step, : width * step].reshape(height, step, width, step, 3)
            unit = {"resolution": (1e4 / mpp / step, 1e4 / mpp / step), "resolutionunit": "CENTIMETER"} if mpp else {}
            tiff.write(
                blocks.mean(axis=(1, 3)).round().astype(np.uint8),
                tile=(128, 128),
                photometric="rgb",
                subfiletype=int(level > 0),
                **({"compression": "deflate"} | unit | options),
            )


def write_plain(path, image, **options):
    Image.fromarray(image).save(path, **options)


def write_ome(path, *levels, axes="YXS", names=None, sizes=UM, bigtiff=False, byteorder="<", **options):
    """Writes one OME image whose levels are in SubIFDs."""
    channels = {"Channel": {"Name": names}} if names else {}
    with tifffile.TiffWriter(path, ome=True, bigtiff=bigtiff, byteorder=byteorder) as tiff:
        first, *rest = levels
        metadata = {"axes": axes} | sizes | channels
        tiff.write(first, subifds=len(rest), metadata=metadata, **(TILED | options))
        for level in rest:
            tiff.write(level, subfiletype=1, **(TILED | options))


def planes(image, order=(0, 1, 2)):
    return np.ascontiguousarray(np.moveaxis(image, 2, 0)[list(order)])
