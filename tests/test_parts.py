"""Parts of an unfinished prediction: what is written can be read, and nothing else counts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from staged_slides import CONFIDENCE, PANEL, Slide, stage

from mclstexp import storage
from mclstexp.errors import PartError
from mclstexp.prediction.parts import part_name, parts_done, read_part


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Slide]:
    """A last short part with missing tiles; a single whole part."""
    folder = tmp_path_factory.mktemp("staging")
    return {"A": stage(folder, "A", 30, 20, missing=7), "C": stage(folder, "C", 16, 16, given=True)}


def test_a_part_of_another_panel_is_refused(slides: dict[str, Slide], tmp_path: Path) -> None:
    shutil.copytree(slides["C"].staging, tmp_path / "C")
    with pytest.raises(PartError, match=r"values float32 \(256, 6\).*expected.*\(256, 5\)"):
        read_part(str(tmp_path / "C"), 0, 256, 5, 0)


def test_a_part_holds_what_was_written_and_nothing_of_missing_tiles(slides: dict[str, Slide]) -> None:
    slide = slides["A"]
    part = read_part(str(slide.staging), 2, 600, len(PANEL), 0)
    complete = slide.complete[512:]
    assert np.array_equal(part.complete, complete)
    assert 0 < complete.sum() < len(complete) == 88
    for name in ("values", *CONFIDENCE):
        values = part.values if name == "values" else part.confidence[name]
        assert np.array_equal(values[complete], getattr(slide.answer, name)[512:][complete])
        assert np.isnan(values[~complete]).all()


def test_only_whole_parts_are_counted(tmp_path: Path) -> None:
    assert parts_done(str(tmp_path)) == set()
    assert part_name(123456) == "tiles/123456.safetensors"
    for name in ("00003.safetensors", "123456.safetensors", ".00004.safetensors.abc", "00005.safetensors.tmp"):
        storage.write(str(tmp_path / "tiles" / name), b"")
    storage.write(str(tmp_path / "parts" / "00006.safetensors"), b"")  # of an earlier version: made again
    assert parts_done(str(tmp_path)) == {3, 123456}
