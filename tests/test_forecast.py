"""What the forecast of a prediction states about the object store."""

import re
from types import SimpleNamespace

import pytest

from mclstexp.config import Config
from mclstexp.prediction import forecast
from mclstexp.prediction.pipeline import WorkerCounts


@pytest.mark.parametrize(("num_readers", "num_embedders"), [(1, 1), (3, 2)])
def test_memory_counts_the_answers_that_wait_to_be_written(num_readers: int, num_embedders: int) -> None:
    """Tiles of 1 px, so that all but the answers is negligible."""
    num_genes = 500_000
    record = SimpleNamespace(num_tiles=256, tile_area_mm2=1.0, width_px=1, height_px=1, reads_regions=True)
    without = dict.fromkeys(("searched_bank", "programs", "calibration", "ood_similarity"))
    model = SimpleNamespace(tile_size_px=1, mpp=0.5, panel=range(num_genes), config=Config(), digest="", **without)
    plan = SimpleNamespace(scratch_budget_bytes=0, features=None, intervals=False)
    cohort = SimpleNamespace(sources=[None], plan=plan)
    text = forecast._in_words(
        cohort,
        model,
        WorkerCounts(num_readers, num_embedders, False),
        [(None, SimpleNamespace(record=record))],
        [],
        forecast._Rates(1.0, 1.0, False),
    )
    stated = re.search(r"memory +about (\S+) GiB of object store", text)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(2 * num_embedders * 256 * num_genes * 4 / 2**30, rel=0.06)
