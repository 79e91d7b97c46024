"""One section in each format, on an image on which each spot has a patch of its own colour.

A tile shows the right place if the colour at its centre names its spot. Tissue lies off the middle of the image, so
that a section that is mirrored, turned or exchanged leaves it.
"""

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from PIL import Image
from prepared_here import PreparedHere, tile
from prepared_tables import write_sheet
from scipy import sparse

FORMATS = ("visium", "h5ad", "legacy_st")
MPP = 2.0
WIDTH, HEIGHT = 800, 500
GENES = [f"GENE{i}" for i in range(1, 7)]


class Placed:
    """80 spots of Visium's array, 100 um or 50 px apart, or with `square` of a square array of `pitch_px`.

    Attributes may be changed before it is written: array_xy and xy_px, float64 (80, 2).
    """

    def __init__(self, square=False, pitch_px=50.0):
        column, row = (axis.ravel().astype(float) for axis in np.meshgrid(np.arange(10), np.arange(8)))
        hexagon = np.stack([2 * column + row % 2, row], axis=1)
        self.array_xy = np.stack([column + 3, row + 5], axis=1) if square else hexagon
        steps = np.ones(2) if square else np.array([0.5, np.sqrt(3) / 2])
        self.xy_px = (self.array_xy - self.array_xy.min(axis=0)) * steps * pitch_px + [60.0, 60.0]
        self.true_xy_px = self.xy_px.copy()
        self.counts = np.random.default_rng(0).poisson(3.0, (80, len(GENES))) + 1
        self.scale = {"spot_diameter_fullres": 65 / MPP, "tissue_hires_scalef": 0.5}
        self.selected = np.ones(80, int)

    @property
    def names(self):
        return [f"AAACCC{i:02d}GT-1" for i in range(80)]

    def pixels(self):
        """The full-resolution image: white, tissue around the true positions, a patch of its own colour per spot."""
        image = np.full((HEIGHT, WIDTH, 3), 245, np.uint8)
        right, bottom = (self.true_xy_px.max(axis=0) + 25).astype(int)
        image[35:bottom, 35:right] = (190, 90, 160)
        for i, (x, y) in enumerate(self.true_xy_px.astype(int)):
            image[y - 9 : y + 10, x - 9 : x + 10] = colour(i)
        return image


def colour(i):
    return 150 + i // 16 * 4, 60 + i % 16 * 4, 150


def shrunk(pixels, scale):
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((round(width * scale), round(height * scale)))


def write_section(folder, section, format_, pixels=None, hires=None, **cells):
    """Writes a section's files and its sheet; returns the sheet.

    Args:
        folder: where.
        section: what.
        format_: of `FORMATS`.
        pixels: of its image im.png, RGB array or PIL image; None: the section's own.
        hires: PIL image that the files have as the hires picture; None: they have its scale factor alone.
        cells: of the sheet.
    """
    pixels = section.pixels() if pixels is None else pixels
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(folder / "im.png", compress_level=1)
    files = {"visium": _visium, "h5ad": _h5ad, "legacy_st": _legacy}[format_](folder, section, hires)
    row = {"section_id": "S1", "patient_id": "P1", "format": format_, "image": "im.png", "mpp": MPP} | files | cells
    return write_sheet(folder, [row])


def wrong_tiles(prepared: PreparedHere, section: Placed) -> list[str]:
    """Returns the spots whose tile does not show their own patch."""
    number = {f"{x:g}x{y:g}": i for i, (x, y) in enumerate(section.array_xy)}
    number |= {name: i for i, name in enumerate(section.names)}
    spots = prepared.spots("S1")
    return [name for name, spot in spots.items() if tuple(tile(spot)[16, 16]) != colour(number[name])]


def _visium(folder, section, hires):
    spatial = folder / "S1" / "spatial"
    spatial.mkdir(parents=True)
    matrix = sparse.csr_matrix(section.counts)
    with h5py.File(folder / "S1" / "filtered_feature_bc_matrix.h5", "w") as file:
        for name, values in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            file[f"matrix/{name}"] = values
        file["matrix/shape"] = np.array([len(GENES), 80])
        file["matrix/barcodes"] = np.array(section.names, "S24")
        for name, values in (("id", GENES), ("name", GENES), ("feature_type", ["Gene Expression"] * len(GENES))):
            file[f"matrix/features/{name}"] = np.array(values, "S24")
    array, px = section.array_xy.astype(int), section.xy_px
    columns = (section.names, section.selected, array[:, 1], array[:, 0], px[:, 1], px[:, 0])
    names = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
    pd.DataFrame(dict(zip(names, columns, strict=True))).to_csv(spatial / "tissue_positions.csv", index=False)
    (spatial / "scalefactors_json.json").write_text(json.dumps(section.scale))
    if hires:
        hires.save(spatial / "tissue_hires_image.png")
    return {"expression": "S1"}


def _h5ad(folder, section, hires):
    obs = pd.DataFrame(
        {"in_tissue": section.selected, "array_row": section.array_xy[:, 1], "array_col": section.array_xy[:, 0]},
        index=section.names,
    )
    obs = obs.dropna(axis=1)
    counts = sparse.csr_matrix(section.counts.astype(np.float32))
    data = anndata.AnnData(counts, obs, pd.DataFrame(index=GENES), obsm={"spatial": section.xy_px})
    images = {"hires": np.asarray(hires)} if hires else {}
    if section.scale:
        data.uns["spatial"] = {"L": {"scalefactors": section.scale, "images": images}}
    data.write_h5ad(folder / "s.h5ad")
    return {"expression": "s.h5ad"}


def _legacy(folder: Path, section, hires):
    array = section.array_xy.astype(int)
    index = [f"{x}x{y}" for x, y in array]
    pd.DataFrame(section.counts, index, GENES).to_csv(folder / "counts.tsv", sep="\t")
    columns = (array[:, 0], array[:, 1], section.xy_px[:, 0], section.xy_px[:, 1], section.selected)
    table = dict(zip(("x", "y", "pixel_x", "pixel_y", "selected"), columns, strict=True))
    pd.DataFrame(table).to_csv(folder / "spots.tsv", sep="\t", index=False)
    return {"expression": "counts.tsv", "positions": "spots.tsv"}
