"""AnnData files of one section: a hexagonal array of 64 spots."""

import anndata
import numpy as np
import pandas as pd
from visium_folders import SECTION

X, Y = SECTION.x, SECTION.y
NUM_SPOTS = 64


def make(**obs):
    """Spot i has i + 1 counts of the first gene."""
    counts = np.stack([np.arange(NUM_SPOTS) + 1, np.full(NUM_SPOTS, 2)], axis=1).astype(np.float32)
    columns = {"array_row": SECTION.row, "array_col": SECTION.column} | obs
    data = anndata.AnnData(counts, pd.DataFrame(columns, SECTION.barcode), pd.DataFrame(index=["GNAS", "FASN"]))
    data.obsm["spatial"] = np.stack([X, Y], axis=1)
    return data


def require_right(found, spots=range(NUM_SPOTS)):
    """Each spot has its own counts, pixels and array position."""
    spots = list(spots)
    assert found.spots.spot_id.tolist() == [SECTION.barcode[i] for i in spots]
    assert found.spots.counts.toarray()[:, 0].tolist() == [i + 1 for i in spots]
    np.testing.assert_array_equal(found.spots.x_px, X[spots])
    np.testing.assert_array_equal(found.spots.y_px, Y[spots])
    np.testing.assert_array_equal(found.spots.array_row, SECTION.row[spots])
    np.testing.assert_array_equal(found.spots.array_col, SECTION.column[spots])
