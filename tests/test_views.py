"""Tables with a wide view: what is stored comes back, and tables without one say so."""

import numpy as np
import pyarrow as pa
import pytest
from one_section import make_one, sentence
from small_table import empty_manifest

from mclstexp.data.schema import WIDE_SCHEMA_VERSION, WIDE_TILE_SCHEMA, Manifest, load_manifest, require_views
from mclstexp.data.spots import TileLoader
from mclstexp.data.table import read_columns, read_sentence, tile_crc
from mclstexp.errors import ConfigError, TableError
from mclstexp.slides.codec import encode_tile

WIDE_PX = 24


def wide_tiles(first, num_spots):
    return np.random.default_rng(1000 + first).integers(0, 256, (num_spots, WIDE_PX, WIDE_PX, 3), np.uint8)


def wide_sentence(first, num_spots):
    images = [encode_tile(tile, "png", 90) for tile in wide_tiles(first, num_spots)]
    crc = pa.array(map(tile_crc, images), pa.uint32())
    one_view = sentence(first, num_spots)
    return one_view.append_column("image_wide", [images]).append_column("crc_wide", crc).cast(WIDE_TILE_SCHEMA)


@pytest.fixture
def made(tmp_path):
    return make_one(tmp_path, sentences=[wide_sentence(0, 9), wide_sentence(9, 8)], wide_px=WIDE_PX, wide_mpp=4.0)


def test_both_views_come_back(made):
    for index, expected in enumerate(made.sentences):
        assert read_sentence(made.root, made.entry, index).equals(expected)
    assert read_columns(made.root, made.entry, ["image_wide"])["image_wide"].to_pylist() == [
        image for each in made.sentences for image in each["image_wide"].to_pylist()
    ]


def test_the_manifest_knows_its_views(made):
    manifest = load_manifest(made.root)
    assert (manifest.schema_version, manifest.views) == (WIDE_SCHEMA_VERSION, ("image", "image_wide"))
    assert [manifest.view_size_px(view) for view in manifest.views] == [16, WIDE_PX]
    assert [manifest.view_mpp(view) for view in manifest.views] == [0.5, 4.0]
    assert Manifest.model_validate_json(manifest.encode()) == manifest


def test_a_table_of_one_view_is_written_as_before_and_refuses_the_other():
    manifest = empty_manifest()
    assert manifest.views == ("image",)
    assert b"wide" not in manifest.encode()
    assert b'"schema_version": 4' in manifest.encode()
    require_views(manifest, ("image",))
    with pytest.raises(ConfigError, match=r"needs the view image_wide, the tile table has image; .*tiles.wide_um"):
        require_views(manifest, ("image", "image_wide"))
    with pytest.raises(ConfigError, match="needs the view image_wide"):
        manifest.view_size_px("image_wide")


@pytest.mark.parametrize("wide", [{"wide_px": 8}, {"wide_px": 8, "wide_mpp": 4.0}, {"schema_version": 5}])
def test_a_half_described_wide_view_is_damage(wide):
    with pytest.raises(ValueError, match="do not fit schema version"):
        Manifest.model_validate(empty_manifest().model_dump() | wide)


@pytest.mark.parametrize("views", [("image",), ("image_wide",), ("image_wide", "image")])
def test_the_loader_decodes_the_views_that_it_is_asked_for(made, views):
    loader = TileLoader(made.root, load_manifest(made.root), views)
    found = loader({"section_id": np.array(["S1"]), "group": np.array([1])})
    assert set(found) == {*views, "mask", "section_id", "group"}
    assert found["mask"].sum() == 8
    if "image_wide" in views:
        np.testing.assert_array_equal(found["image_wide"][0, :8], wide_tiles(9, 8))
    if "image" in views:
        assert found["image"].shape == (1, 16, 16, 16, 3)


def test_a_wide_tile_that_does_not_match_its_checksum_names_the_spot(tmp_path):
    wrong = wide_sentence(0, 9)
    crc = wrong["crc_wide"].to_pylist()
    wrong = wrong.set_column(wrong.num_columns - 1, "crc_wide", pa.array([*crc[:4], crc[4] + 1, *crc[5:]], pa.uint32()))
    made = make_one(tmp_path, sentences=[wrong], wide_px=WIDE_PX, wide_mpp=4.0)
    with pytest.raises(TableError, match=r"the tile of spot spot4 \(image_wide\) does not match"):
        read_sentence(made.root, made.entry, 0)
