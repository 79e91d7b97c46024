"""The synthetic cohort: reproducible, readable, and predictable from texture alone."""

from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest

from ingest.readers import READERS
from ingest.synthetic import CohortSpec, make_cohort
from mclstexp.data.sheet import read_sheet
from mclstexp.evaluation.metrics import pearson_per_gene
from mclstexp.model.probe import Probe
from mclstexp.slides.codec import decode_tile, encode_tile

SPEC = CohortSpec(num_patients=4, array_side=12, pitch_px=32, num_genes=80, median_counts=2500)
EDGE = SPEC.pitch_px
TRAINING = (0, 1, 2)


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_cohort(tmp_path_factory.mktemp("synthetic"), SPEC)).parent


def test_equal_specs_give_equal_files(tmp_path: Path) -> None:
    first, again = (Path(make_cohort(tmp_path / name, CohortSpec.tiny())).parent for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_sheet_is_valid_and_slides_are_pyramids_with_a_resolution(learnable: Path) -> None:
    rows = read_sheet(str(learnable / "samples.csv"), READERS)
    assert [row.format for row in rows].count("slide") == 1
    assert len({row.patient_id for row in rows}) == SPEC.num_patients + 1
    with openslide.OpenSlide(learnable / "P1S1.tif") as slide:
        assert slide.level_count > 1
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(1.0)


def test_library_sizes_and_stains_vary(learnable: Path) -> None:
    totals = [pd.read_csv(learnable / f"P{p}S1.tsv.gz", sep="\t", index_col=0).sum(axis=1) for p in range(1, 5)]
    assert all(total.std() / total.mean() > 0.3 for total in totals)
    colours = np.array([_tiles(learnable, f"P{p}S1", 95)[0].mean(axis=(0, 1, 2)) for p in range(1, 5)])
    assert np.ptp(colours, axis=0).max() > 10


@pytest.mark.parametrize(("jpeg_quality", "lowest", "highest"), [(95, -0.15, 0.15), (90, 0.3, 0.9)])
def test_colour_predicts_nothing_unless_jpeg_halves_it(
    learnable: Path, jpeg_quality: int, lowest: float, highest: float
) -> None:
    """Halved colour resolution blurs fine textures more than coarse ones, and deviation tells them apart."""
    features, target, patients = [], [], []
    for patient in range(SPEC.num_patients):
        for section in range(SPEC.sections_per_patient):
            tiles, counts = _tiles(learnable, f"P{patient + 1}S{section + 1}", jpeg_quality)
            features.append(np.concatenate([tiles.mean(axis=(1, 2)), tiles.std(axis=(1, 2))], axis=1))
            target.append(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)))
            patients.append(np.full(len(tiles), patient))
    x, y, patient = (np.concatenate(part) for part in (features, target, patients))
    train = np.isin(patient, TRAINING)
    predicted = Probe(x[train], y[train]).predict(x[~train])
    assert lowest < np.nanmean(pearson_per_gene(y[~train], predicted)) < highest


def _tiles(folder: Path, section_id: str, jpeg_quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a section's tiles on tissue, as stored at a JPEG quality, and their counts."""
    spots = pd.read_csv(folder / f"{section_id}_selection.tsv", sep="\t")
    counts = pd.read_csv(folder / f"{section_id}.tsv.gz", sep="\t", index_col=0).to_numpy(float)
    tissue = spots["selected"].to_numpy() == 1
    with openslide.OpenSlide(folder / f"{section_id}.tif") as slide:
        corners = spots.loc[tissue, ["pixel_x", "pixel_y"]].to_numpy(int) - EDGE // 2
        cut = [np.asarray(slide.read_region(tuple(map(int, corner)), 0, (EDGE, EDGE)))[..., :3] for corner in corners]
    return np.stack([decode_tile(encode_tile(tile, "jpeg", jpeg_quality)) for tile in cut]), counts[tissue]
