"""Bins of Visium HD: Space Ranger numbers them from either side of the image, and their names state their size."""

import numpy as np
import pytest
from placed_section import Placed, write_section, wrong_tiles
from prepared_here import prepare_here

from mclstexp.errors import SourceError

PITCH_PX = 50.0
pytestmark = pytest.mark.odd
every_format = pytest.mark.parametrize("format_", ["visium", "h5ad"])


class Bins(Placed):
    """80 bins of 16 um, of 0.32 um/px."""

    def __init__(self, steps=(1, 1)):
        super().__init__(square=True, pitch_px=PITCH_PX)
        corner = self.array_xy.min(axis=0) + self.array_xy.max(axis=0)
        self.array_xy = np.where(np.array(steps) > 0, self.array_xy, corner - self.array_xy)
        self.scale = {"spot_diameter_fullres": PITCH_PX, "tissue_hires_scalef": 0.5}

    @property
    def names(self):
        return [f"s_016um_{row:05.0f}_{column:05.0f}-1" for column, row in self.array_xy]


@every_format
@pytest.mark.parametrize("steps", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("mpp", [0.32, ""])
def test_bins_are_numbered_from_either_side(tmp_path, format_, steps, mpp):
    section = Bins(steps)
    prepared = prepare_here(write_section(tmp_path, section, format_, mpp=mpp), tmp_path / "out")
    assert wrong_tiles(prepared, section) == []
    assert len(prepared.spots("S1")) == 80
    assert prepared.entries["S1"].source_mpp == pytest.approx(0.32)


@every_format
def test_a_resolution_that_contradicts_the_size_of_the_bins_is_refused(tmp_path, format_):
    sheet = write_section(tmp_path, Bins(), format_, mpp=0.25)
    with pytest.raises(
        SourceError, match=r"mpp is 0\.25 in the sheet and 0\.32 in the array of spots.*and 16 um apart"
    ):
        prepare_here(sheet, tmp_path / "out")


@every_format
def test_exchanged_axes_of_bins_are_seen_by_the_tissue(tmp_path, format_):
    section = Bins()
    section.xy_px = section.xy_px[:, ::-1]
    with pytest.raises(SourceError, match="if you exchange x and y of the positions"):
        prepare_here(write_section(tmp_path, section, format_, mpp=0.32), tmp_path / "out")
