"""Tables with wide views as prepare cuts them: right pixels, the same spots, and settings that do not fit refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from prepared_here import prepare_here, tile
from prepared_tables import copy_of, run
from round_slide import make_plan
from wide_reference import reference

from ingest.plan import _settings_digest, describe
from ingest.section import Recipe
from mclstexp.data.schema import IMAGE_WIDE, load_manifest
from mclstexp.data.spots import TileLoader
from mclstexp.data.table import read_sentence
from mclstexp.errors import ConfigError
from mclstexp.prediction.parts import SlideRecord
from mclstexp.prediction.pipeline import Row
from mclstexp.prediction.tile_reader import TileReader
from mclstexp.settings import TilesConfig
from mclstexp.slides.codec import decode_tile

WIDE = {"tiles.wide_um": 160.0, "tiles.wide_px": 20}  # 8 slide px per pixel of the view


@pytest.fixture
def one(cohort, tmp_path):
    return copy_of(cohort, tmp_path / "cohort", ["P1S1"])


def test_each_spot_has_its_surroundings(cohort, one, tmp_path):
    image = tifffile.imread(Path(cohort).parent / "P1S1.tif", level=0)
    spots = prepare_here(one, tmp_path / "out", **WIDE).spots("P1S1")
    assert len(spots) == 36
    beyond = 0
    for spot in spots.values():
        left, top = np.floor(spot["x_px"]) - 80, np.floor(spot["y_px"]) - 80
        beyond += left < 0 or top < 0
        found = decode_tile(spot[IMAGE_WIDE]).astype(float)
        assert np.abs(found - reference(image, left, top, 20, 8.0)).mean() < 1.5
    assert beyond, "some surroundings extend beyond the image, and their spots are kept"


def test_everything_else_is_as_without_wide_views(one, tmp_path):
    narrow, wide = (prepare_here(one, tmp_path / name, **more) for name, more in (("narrow", {}), ("wide", WIDE)))
    for name, spot in wide.spots("P1S1").items():
        rest = {column: value for column, value in spot.items() if not column.endswith("_wide")}
        assert rest == narrow.spots("P1S1")[name]
        assert tile(spot).shape == (32, 32, 3)
    assert wide.rejects("P1S1") == narrow.rejects("P1S1")


def test_the_plan_says_the_views(one, tmp_path):
    narrow, wide = (prepare_here(one, tmp_path / name, **more) for name, more in (("narrow", {}), ("wide", WIDE)))
    assert "views      image\n" in describe(narrow.plan)
    assert "views      image, image_wide (20 px at 8 um/px = 160 um)\n" in describe(wide.plan)


def test_prepare_cuts_a_wide_view_by_default(one, tmp_path):
    made = prepare_here(one, tmp_path / "out", **{"tiles.wide_um": TilesConfig().wide_um})
    assert "views      image, image_wide (112 px at 5.518 um/px = 618 um)\n" in describe(made.plan)
    spots = made.spots("P1S1").values()
    assert {decode_tile(spot[IMAGE_WIDE]).shape for spot in spots} == {(112, 112, 3)}


def fingerprint(one, out, **settings):
    return prepare_here(one, out, **settings).entries["P1S1"].fingerprint


def test_settings_of_the_wide_view_cut_again_only_where_there_is_one(one, tmp_path):
    plain = fingerprint(one, tmp_path / "a")
    assert fingerprint(one, tmp_path / "b", **{"tiles.wide_px": 20}) == plain
    wide = fingerprint(one, tmp_path / "c", **WIDE)
    other = fingerprint(one, tmp_path / "d", **(WIDE | {"tiles.wide_px": 24}))
    assert len({plain, wide, other}) == 3


def test_tables_from_before_there_were_views_are_not_cut_again():
    assert _settings_digest(Recipe(TilesConfig(wide_um=None, jpeg_quality=90), 1.0)) == "e3b3cc21998128b2"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tiles.wide_um": 32}, r"tiles\.wide_um=32 is not wider than the tile of 32 px x 1 um/px = 32 um"),
        (
            {"tiles.wide_um": 100, "tiles.wide_px": 400},
            r"tiles\.wide_px=400 would enlarge P1S1 by 4.*lower tiles\.wide_px, or leave .*\(tiles\.wide_um=none\)",
        ),
        ({"tiles.wide_um": 618, "tiles.mpp": 20}, r"not wider than the tile .* 640 um; .*\(tiles\.wide_um=none\)"),
    ],
)
def test_views_that_show_nothing_more_are_refused(one, tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        prepare_here(one, tmp_path / "out", **settings)


@pytest.mark.parametrize("views", [("image", "image_wide"), ("image_wide", "image"), ("image_wide",), ("image",)])
def test_prediction_reads_the_views_that_the_table_has(one, cohort, tmp_path, views):
    spots = list(prepare_here(one, tmp_path / "out", **WIDE).spots("P1S1").values())
    wide = (20, 8.0) if "image_wide" in views else None
    plan = make_plan(tmp_path, tiles=TilesConfig(size_px=32, encoding="png"), mpp=1.0, views=views, wide=wide)
    table = pa.Table.from_pylist([{name: spot[name] for name in ("x_px", "y_px")} for spot in spots])
    with TileReader(plan) as reader:
        record = SlideRecord.model_construct(mpp=1.0, scale=1.0)
        found = reader.read_part(str(Path(cohort).parent / "P1S1.tif"), table, record)
    assert found.pop("complete")[:36].all()
    row = Row("P1S1", "", num_tiles=36, **found)
    assert len(row.inputs) == len(views)
    for pixels, view in zip(row.inputs, views, strict=True):
        np.testing.assert_array_equal(pixels, np.stack([decode_tile(spot[view]) for spot in spots]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_table_gets_wide_views_and_loses_them_again(one, tmp_path):
    out = tmp_path / "out"
    before = run(one, out).manifest
    made = run(one, out, **WIDE)
    assert (made.redone, made.manifest.schema_version, made.manifest.views) == (("P1S1",), 5, ("image", "image_wide"))
    assert (made.manifest.wide_px, made.manifest.wide_mpp) == (20, 8.0)
    assert run(one, out, **WIDE).redone == ()
    manifest = load_manifest(str(out))
    stored = read_sentence(str(out), manifest.sections[0], 0)
    loaded = TileLoader(str(out), manifest, manifest.views)({"section_id": np.array(["P1S1"]), "group": np.array([0])})
    for view in manifest.views:
        np.testing.assert_array_equal(loaded[view][0, 0], decode_tile(stored[view][0].as_py()))
    again = run(one, out).manifest
    same = {"file", "rejects_file", "thumbnail_file"}
    assert again.model_dump(exclude={"sections"}) == before.model_dump(exclude={"sections"})
    assert again.sections[0].model_dump(exclude=same) == before.sections[0].model_dump(exclude=same)
