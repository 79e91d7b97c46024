"""Feature files of others: what is read from TRIDENT's layout, what is refused, the slide and tiles that they give."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import round_slide
from random_version import random_version
from test_pipeline import read_all
from trident_files import write_features

from mclstexp import storage
from mclstexp.data.features import EncoderRecord
from mclstexp.errors import PredictError, SheetError, SourceError
from mclstexp.model.frozen import FrozenEncoder
from mclstexp.model.presets import IMAGENET_MEAN, IMAGENET_STD
from mclstexp.model.version import ModelVersion
from mclstexp.prediction.feature_cohort import feature_needs, list_feature_files
from mclstexp.prediction.feature_files import FeatureFile, FeatureNeeds
from mclstexp.prediction.inspect import inspect
from mclstexp.prediction.parts import GRID, PART_TILES, read_thumbnail
from mclstexp.prediction.pipeline import QUARANTINED, TILES
from mclstexp.prediction.plan import CohortPlan, SlideSource, attempt_key
from mclstexp.prediction.slide_cache import clear
from mclstexp.settings import TilesConfig

WIDTH, NUM_TILES, EDGE_PX = 24, PART_TILES + 44, 512
NEEDS = FeatureNeeds("uni", "class", WIDTH, ("uni_v1", "uni"), keeps_size=False)
UM_PER_PX = 0.571  # 224 px of it are as wide as 512 px at .25
RECORD = EncoderRecord(
    name="someone's",
    digest="d",
    tile_size_px=224,
    layers=("class",),
    widths=(WIDTH,),
    resize_px=224,
    crop_px=None,
    scaling="encoder",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)


def make_plan(folder: Path, **changes: object) -> CohortPlan:
    tiles = TilesConfig(size_px=224)
    return round_slide.make_plan(folder, **{"tiles": tiles, "mpp": UM_PER_PX, "features": NEEDS} | changes)


def tiles_of(num_tiles: int = NUM_TILES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    across = max(1, int(np.sqrt(num_tiles)))
    corners = np.stack([np.arange(num_tiles) % across, np.arange(num_tiles) // across], axis=1) * EDGE_PX + 1024
    return rng.normal(size=(num_tiles, WIDTH)).astype(np.float32), corners.astype(np.int64)


def source_of(path: Path, mpp: float | None = None) -> SlideSource:
    return SlideSource(path.stem, "P", "site", str(path), mpp)


def slide_of(folder: Path, **options: object) -> SlideSource:
    return source_of(write_features(folder / "features_uni_v1" / "a.h5", *tiles_of(), **options))  # type: ignore[arg-type]


def test_a_file_gives_tiles_in_its_order(tmp_path: Path) -> None:
    corners = tiles_of()[1]
    source = slide_of(tmp_path, slide_px=(30_000, 20_000))
    found = inspect(source, make_plan(tmp_path))
    record = found.record
    assert (record.slide_id, record.patient_id, record.site, record.image) == ("a", "P", "site", source.image)
    assert (record.width_px, record.height_px, record.num_tiles) == (30_000, 20_000, NUM_TILES)
    assert (record.mpp, record.mpp_source) == (0.25, "magnification")
    assert record.scale == EDGE_PX / 224
    assert "nobody looked" in record.not_h_and_e
    assert record.tile_area_mm2 == pytest.approx(NUM_TILES * 0.128**2)
    assert record.tissue_area_mm2 == pytest.approx(record.tile_area_mm2, rel=0.1)
    table = pq.read_table(pa.BufferReader(storage.read(storage.join(found.staging, GRID))))
    centres = np.stack([table[name].to_numpy() for name in ("x_px", "y_px")], axis=1)
    np.testing.assert_array_equal(centres, corners + EDGE_PX / 2)
    np.testing.assert_allclose(table["x_um"].to_numpy(), centres[:, 0] * 0.25)
    assert table["spot_id"].to_pylist() == [str(row) for row in range(NUM_TILES)]
    assert table["tissue_fraction"].null_count == table["array_row"].null_count == NUM_TILES
    picture = read_thumbnail(found.staging)
    assert picture.shape[:2] == (round(20_000 / record.thumbnail_scale), 1024)
    x, y = ((corners[0] + EDGE_PX / 2) / record.thumbnail_scale).astype(int)
    assert picture[y, x].min() < 230, "its tiles are drawn"
    assert picture[-5:].min() > 245, "where there are none it is white"
    assert inspect(source, make_plan(tmp_path)) == found, "read back"


def test_parts_have_the_features_of_their_tiles(tmp_path: Path) -> None:
    features, _ = tiles_of()
    rows = read_all(slide_of(tmp_path), make_plan(tmp_path))
    assert [(row["state"], row["part"], row["num_tiles"]) for row in rows] == [(TILES, 0, 256), (TILES, 1, 44)]
    assert rows[1]["features"].dtype == np.float32
    assert rows[1]["features"].shape == (PART_TILES, WIDTH)
    np.testing.assert_array_equal(np.concatenate([row["features"] for row in rows])[:NUM_TILES], features)
    assert not rows[1]["features"][44:].any()
    assert [int(row["complete"].sum()) for row in rows] == [256, 44]
    assert not any("pixels" in row for row in rows)


def test_a_remote_file_is_read_from_a_copy_that_is_released(tmp_path: Path, s3: str) -> None:
    storage.upload(slide_of(tmp_path).image, f"{s3}/features_uni_v1/a.h5")
    source, plan = SlideSource("a", "P", "", f"{s3}/features_uni_v1/a.h5", None), make_plan(tmp_path)
    rows = read_all(source, plan)
    np.testing.assert_array_equal(np.concatenate([row["features"] for row in rows])[:NUM_TILES], tiles_of()[0])
    clear(plan.scratch)
    assert not Path(plan.scratch).exists(), "nobody uses it any more"


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_number_formats_and_a_batch_of_one_are_read(tmp_path: Path, kind: type) -> None:
    features, corners = tiles_of(3)
    path = write_features(tmp_path / "a.h5", features[None].astype(kind), corners[None])
    with FeatureFile(str(path)) as file:
        facts = file.facts()
        np.testing.assert_array_equal(file.read(1, 3), features[1:].astype(kind).astype(np.float32))
    assert (facts.width, facts.corners.tolist(), facts.slide_px) == (WIDTH, corners.tolist(), (1536, 2560))


def test_a_slide_without_tiles_is_empty(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.h5", np.zeros((0, WIDTH), np.float32), np.zeros((0, 2), np.int64))
    found = inspect(source_of(path), make_plan(tmp_path, features=replace(NEEDS, folder="uni_v1")))
    assert (found.record.num_tiles, found.record.tissue_area_mm2) == (0, 0)


def test_a_sheets_resolution_is_exact_and_comes_first(tmp_path: Path) -> None:
    """40x stands for every scan from .2 to .3 um/px."""
    source = replace(slide_of(tmp_path), mpp=0.2265)
    with pytest.raises(SourceError, match=r"tiles are 116 um wide \(512 px at 0.2265 um/px by its sheet\).*127.9 um"):
        inspect(source, make_plan(tmp_path))
    found = inspect(source, make_plan(tmp_path, mpp=0.2265 * EDGE_PX / 224))
    assert (found.record.mpp, found.record.mpp_source) == (0.2265, "sheet")


def test_a_file_without_magnification_takes_the_assumed_resolution(tmp_path: Path) -> None:
    source = slide_of(tmp_path, level0_magnification="None")
    with pytest.raises(SourceError, match="sheet and magnification state none"):
        inspect(source, make_plan(tmp_path))
    assert inspect(source, make_plan(tmp_path, assume_mpp=0.25)).record.mpp_source == "assumed"


@pytest.mark.odd
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"encoder": "gpfm"}, r"of the encoder gpfm, the model takes uni \(as uni_v1, uni\)"),
        (
            {"magnifications": (40, 10)},
            r"are 256 um wide \(1024 px at 0.25 .*magnification\), the model takes 12",
        ),
        ({"patch_size": 224}, r"tiles are 112 um wide"),
        ({"patch_size_level0": None}, "no attribute patch_size_level0 .*it has level0_magnification, name"),
        ({"patch_size_level0": -1}, "patch_size_level0 of coords is '-1', expected a number above 0"),
        ({"slide_px": (4000, 90_000)}, r"tiles are outside its slide of 4000 x 90000 px"),
    ],
)
def test_another_encoder_or_scale_is_refused_with_both_values(tmp_path: Path, options: dict, fault: str) -> None:
    with pytest.raises(SourceError, match=fault):
        inspect(slide_of(tmp_path, **options), make_plan(tmp_path))


@pytest.mark.odd
@pytest.mark.parametrize(
    ("features", "corners", "fault"),
    [
        (
            np.zeros((3, 7), np.float32),
            None,
            r"features of uni_v1 are 7 wide, .* the layer class of uni, 24",
        ),
        (np.zeros(24, np.float32), None, r"features is float32 \(24,\), expected floats .* not of a slide"),
        (np.zeros((3, 24), np.int32), None, r"features is int32 \(3, 24\)"),
        (None, np.zeros((4, 2), np.int64), r"coords is \(4, 2\), expected two finite numbers for each of 3 tiles"),
        (None, np.full((3, 2), np.nan), r"finite numbers"),
    ],
)
def test_other_arrays_are_refused(
    tmp_path: Path, features: np.ndarray | None, corners: np.ndarray | None, fault: str
) -> None:
    own = tiles_of(3)
    path = write_features(
        tmp_path / "a.h5", own[0] if features is None else features, own[1] if corners is None else corners
    )
    with pytest.raises(SourceError, match=fault):
        inspect(source_of(path), make_plan(tmp_path))


def test_features_that_are_not_finite_quarantine_their_slide_by_the_tile(tmp_path: Path) -> None:
    features, corners = tiles_of()
    features[290, 3] = np.inf
    path = write_features(tmp_path / "a.h5", features, corners)
    first, second = read_all(source_of(path), make_plan(tmp_path))
    assert (first["state"], second["state"]) == (TILES, QUARANTINED)
    assert "features of tile 290 are not finite" in second["reason"]


@pytest.mark.odd
def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = Path(slide_of(tmp_path).image)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"a\.h5 cannot be read as HDF5"):
        inspect(source_of(path), make_plan(tmp_path))
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((1, 2))
    with pytest.raises(SourceError, match=r"no dataset 'features' \(it has coords\)"):
        inspect(source_of(path), make_plan(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        inspect(source_of(path), make_plan(tmp_path))


def test_a_file_that_states_no_encoder_counts_as_one_of_its_folders(tmp_path: Path) -> None:
    source = slide_of(tmp_path, encoder=None)
    plan = make_plan(tmp_path)
    with pytest.raises(SourceError, match=r"neither .* states an encoder.*rename the folder to features_uni_v1"):
        inspect(source, plan)
    named = replace(plan, features=replace(NEEDS, folder="uni_v1"))
    assert inspect(source, named).record.num_tiles == NUM_TILES
    assert attempt_key(source, "f", named) != attempt_key(source, "f", plan), "a renamed folder is tried again"


def test_an_encoder_that_takes_tiles_as_they_are_needs_their_very_size(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, features=replace(NEEDS, keeps_size=True))
    with pytest.raises(SourceError, match=r"were 256 px wide, the model takes 224 px, .*--patch_size 224"):
        inspect(slide_of(tmp_path), plan)
    exact = slide_of(tmp_path, patch_size=224, patch_size_level0=EDGE_PX)
    assert inspect(exact, plan).record.num_tiles == NUM_TILES


def _version(record: dict | None, **settings: object) -> ModelVersion:
    """Returns a version on the features of the encoder of RECORD with changes; None: on its own."""
    version = random_version()
    model = version.config.model.model_copy(update=settings)
    version.config = version.config.model_copy(update={"model": model})
    version.encoder = None if record is None else FrozenEncoder(RECORD.model_copy(update=record))
    return version


def test_what_a_model_takes_from_a_folder() -> None:
    needs = feature_needs(_version({}), "s3://bucket/20x_256px/features_someone's/")
    assert (needs.layer, needs.width, needs.folder, needs.keeps_size) == ("class", WIDTH, "someone's", False)
    assert feature_needs(_version({"resize_px": None}), "/data/h5").keeps_size


@pytest.mark.odd
@pytest.mark.parametrize(
    ("record", "settings", "folder", "fault"),
    [
        (None, {}, "f", "trained its image encoder.*--samples"),
        ({"layers": ("a", "b"), "widths": (1, 2)}, {}, "f", r"takes 2 blocks of features \(image/a, image/b\)"),
        ({}, {"image_views": ("image_wide",)}, "f", r"image_wide/class"),
        ({}, {"test_turns": True}, "f", "model.test_turns"),
        ({"name": "timm/resnet18"}, {}, "features_x", r"give the folder features_resnet18$"),
        ({}, {}, "features_gpfm", r"features_gpfm has features of the encoder gpfm, the model takes someone's"),
    ],
)
def test_a_model_that_takes_what_no_such_file_has_is_refused(
    record: dict | None, settings: dict, folder: str, fault: str
) -> None:
    with pytest.raises(PredictError, match=fault):
        feature_needs(_version(record, **settings), folder)


def test_the_files_of_a_folder_are_its_slides(tmp_path: Path, s3: str) -> None:
    for name in ("b c.h5", "a.h5", ".hidden.h5", "a.pt", "deep/d.h5"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        storage.write(f"{s3}/f/{name}", b"x")
    assert [(slide.slide_id, slide.image) for slide in list_feature_files(str(tmp_path))] == [
        ("a", str(tmp_path / "a.h5")),
        ("b_c", str(tmp_path / "b c.h5")),
    ]
    assert [slide.image for slide in list_feature_files(f"{s3}/f/")] == [f"{s3}/f/a.h5", f"{s3}/f/b c.h5"]
    (tmp_path / "job").mkdir()
    (tmp_path / "deep").rename(tmp_path / "job" / "features_x")
    with pytest.raises(
        SheetError, match=r"no feature file \(.h5\) in .*job \(some are in .*job/features_x\): give the"
    ):
        list_feature_files(str(tmp_path / "job"))
