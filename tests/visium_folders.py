"""Visium folders of every kind, of one small section."""

import gzip
import json
import math

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from mclstexp.data.sheet import SectionRow

MPP = 0.5
HD_MPP = 0.49  # as the file states it; the array gives MPP
FEATURES = [
    ("ENSG00000087460.24", "GNAS", "Gene Expression"),
    ("ENSG00000169710", "FASN", "Gene Expression"),
    ("CD3_TotalSeqB", "CD3", "Antibody Capture"),
    ("ENSG00000999999", "ENSG00000999999", "Gene Expression"),
    ("GFP", "GFP", "Gene Expression"),
]
GENES = [
    ("ENSG00000087460", "GNAS", "ENSG00000087460"),
    ("ENSG00000169710", "FASN", "ENSG00000169710"),
    ("ENSG00000999999", "", "ENSG00000999999"),
    ("GFP", "GFP", ""),
]
GENE_ROWS = [0, 1, 3, 4]


class Section:
    """A hexagonal array of 8 x 8 spots, 100 um apart, turned by 3 degrees on an image of 0.5 um/px."""

    def __init__(self):
        rng = np.random.default_rng(0)
        array = [(row, 2 * step + row % 2) for row in range(8) for step in range(8)]
        self.barcode = [f"AAC{row:02d}{column:02d}-1" for row, column in array]
        self.row, self.column = np.array(array).T
        x_um, y_um = self.column * 50.0, self.row * 50.0 * math.sqrt(3)
        turn = math.radians(3)
        self.x = 300 + (x_um * math.cos(turn) - y_um * math.sin(turn)) / MPP
        self.y = 300 + (x_um * math.sin(turn) + y_um * math.cos(turn)) / MPP
        self.in_tissue = np.ones(64, int)
        self.in_tissue[[5, 9]] = 0
        self.counts = rng.poisson(2.0, (64, len(FEATURES))) + 1
        self.counts[7, GENE_ROWS] = 0  # an antibody alone is not expression
        self.counted = [i for i in range(64) if i not in (5, 20)]  # 9 is off the tissue but has counts

    @property
    def expected(self):
        return [i for i in self.counted if i not in (7, 9)]


SECTION = Section()


def zipped(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_mtx(folder, features="features.tsv.gz", columns=3, suffix=".gz"):
    order = SECTION.counted[::-1]  # of its own, unlike that of the positions
    part = SECTION.counts[order].T
    cells = [(f + 1, b + 1, part[f, b]) for f, b in zip(*np.nonzero(part), strict=True)]
    head = f"%%MatrixMarket matrix coordinate integer general\n%metadata_json: {{}}\n{part.shape[0]} {part.shape[1]} "
    zipped(folder / f"matrix.mtx{suffix}", f"{head}{len(cells)}\n" + "".join(f"{a} {b} {n}\n" for a, b, n in cells))
    lines = ["\t".join(f[1:2] if columns == 1 else f[:columns]) for f in FEATURES]
    zipped(folder / features, "\n".join(lines) + "\n")
    zipped(folder / f"barcodes.tsv{suffix}", "\n".join(SECTION.barcode[i] for i in order) + "\n")


def write_h5(path):
    order = SECTION.counted[::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = [np.flatnonzero(SECTION.counts[i]) for i in order]
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([SECTION.barcode[i] for i in order], "S18")
        matrix["data"] = np.concatenate([SECTION.counts[i, f] for i, f in zip(order, lists, strict=True)]).astype("i4")
        matrix["indices"] = np.concatenate(lists)
        matrix["indptr"] = np.cumsum([0, *map(len, lists)])
        matrix["shape"] = np.array([len(FEATURES), len(order)], "i4")
        for name, values in zip(("id", "name", "feature_type"), zip(*FEATURES, strict=True), strict=True):
            matrix[f"features/{name}"] = np.array(values, "S32")


def positions():
    cells = (SECTION.barcode, SECTION.in_tissue, SECTION.row, SECTION.column, SECTION.y, SECTION.x)
    names = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
    return pd.DataFrame(dict(zip(names, cells, strict=True)))


def write_spatial(folder, name, scale=None):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        positions().to_parquet(folder / name)
    else:
        positions().to_csv(folder / name, index=False, header="list" not in name)
    scale = {"spot_diameter_fullres": 65 / MPP, "tissue_hires_scalef": 0.1} | (scale or {})
    (folder / "scalefactors_json.json").write_text(json.dumps(scale))


def v1_h5(sample):
    write_h5(sample / "outs/filtered_feature_bc_matrix.h5")
    write_spatial(sample / "outs/spatial", "tissue_positions_list.csv")
    return sample / "outs"


def v1_mtx(sample):
    write_mtx(sample / "filtered_feature_bc_matrix")
    write_spatial(sample / "spatial", "tissue_positions_list.csv")
    return sample


def v2_h5_in_sample_folder(sample):
    write_h5(sample / "outs/filtered_feature_bc_matrix.h5")
    write_spatial(sample / "outs/spatial", "tissue_positions.csv")
    return sample


def v2_mtx(sample):
    write_mtx(sample / "outs/filtered_feature_bc_matrix")
    write_spatial(sample / "outs/spatial", "tissue_positions.csv")
    return sample / "outs"


def hd(sample, bins="square_016um"):
    folder = sample / "binned_outputs" / bins
    write_h5(folder / "filtered_feature_bc_matrix.h5")
    write_spatial(folder / "spatial", "tissue_positions.parquet", {"microns_per_pixel": HD_MPP, "bin_size_um": 16.0})
    (sample / "spatial").mkdir()  # of the whole slide, without positions
    return sample


def hd_bin_folder(sample):
    return hd(sample, "square_008um") / "binned_outputs/square_008um"


LAYOUTS = [v1_h5, v1_mtx, v2_h5_in_sample_folder, v2_mtx, hd, hd_bin_folder]


def section(tmp_path, folder, **changes):
    image = tmp_path / "image.png"
    if not image.exists():
        Image.new("RGB", (8, 8)).save(image)
    row = SectionRow(section_id="S1", patient_id="P1", image=str(image), format="visium", expression=str(folder))
    return row.model_copy(update=changes)
