"""JPEG storage tiles: the pixels that OpenSlide shows, each storage tile decoded once, odd files left to OpenSlide."""

import os
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from jpeg_files import EDGE, bare, rgb, storage_tiles, write_jpeg, ycbcr
from slide_files import texture, write_pyramid

from mclstexp.errors import SourceError
from mclstexp.slides import jpeg_tiles
from mclstexp.slides.jpeg_tiles import JpegTiles, jpeg_levels
from mclstexp.slides.pyramid import Pyramid
from mclstexp.slides.slide import Slide, open_slide
from mclstexp.slides.tiles import curve_order

real_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
WIDTH, HEIGHT = 901, 701
LEVELS = [texture(HEIGHT, WIDTH)[::step, ::step] for step in (1, 2, 4)]
"""Of odd edges, so that coarser levels are not shrunk by whole factors."""
FIRST, TENTH = (list(storage_tiles(LEVELS[0]))[index] for index in (0, 9))
WITHIN_TENTH = 130, 150  # a corner in level-0 pixels


def shared(encode):
    """Storage tiles whose tables are in the directory, which then is all that states their colours."""
    return {"encode": lambda tile: bare(encode(tile))[1], "jpegtables": bare(encode(FIRST))[0]}


def write_mixed(path):
    write_jpeg(path, LEVELS[0])
    tile = (EDGE, EDGE)
    tifffile.imwrite(
        path, LEVELS[1], append=True, tile=tile, photometric="rgb", compression="deflate", subfiletype=1, metadata=None
    )


USUAL = {
    "colours of half resolution": {},
    "colours of full resolution": {"encode": lambda tile: ycbcr(tile, "444"), "subsampling": (1, 1)},
    "shared tables": shared(ycbcr),
    "RGB": {"encode": rgb, "photometric": "rgb"},
    "RGB with shared tables": shared(rgb) | {"photometric": "rgb"},
    "Aperio": {"is_aperio": True},
    "BigTIFF, big endian": {"form": {"bigtiff": True, "byteorder": ">"}},
}


def difference(slide, reference, level, left, top, width, height):
    """The largest one between a region and OpenSlide's; both begin at the same place."""
    found, *origin = slide.read(level, left, top, width, height)
    expected, *expected_origin = reference.read(level, left, top, width, height)
    assert origin == expected_origin
    assert found.shape[:2] == expected.shape[:2] == (height, width)
    return np.abs(found[..., :3].astype(int) - expected[..., :3]).max()


def both(path):
    """A file's levels as read here, which must decode themselves, and by OpenSlide."""
    slide, reference = open_slide(path)._levels, Pyramid(str(path))
    assert isinstance(slide, JpegTiles)
    for name in ("dimensions", "downsamples", "mpp", "scanned_from", "reads_regions"):
        assert getattr(slide, name) == getattr(reference, name)
    return slide, reference


@pytest.mark.parametrize("form", USUAL)
def test_regions_are_those_of_openslide(tmp_path, monkeypatch, form):
    path, image = tmp_path / "a.tif", LEVELS[0]
    write_jpeg(path, *LEVELS, **USUAL[form])
    slide, reference = both(path)
    monkeypatch.setattr(slide, "_slide", None)  # it is not asked
    for left, top, width, height in [(0, 0, 224, 224), (127, 129, 130, 7), (WIDTH - 90, HEIGHT - 99, 90, 99)]:
        assert difference(slide, reference, 0, left, top, width, height) == 0
        crop = image[top : top + height, left : left + width].astype(int)
        assert np.abs(slide.read(0, left, top, width, height)[0] - crop).mean() < 1.5
    for level, left, top in [(1, 0, 0), (1, 301, 203), (2, 99, 57)]:
        assert difference(slide, reference, level, left, top, 100, 100) <= 2


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.3, 4.1])
def test_tiles_are_those_of_openslide(tmp_path, scale):
    write_jpeg(tmp_path / "a.tif", *LEVELS)
    with open_slide(tmp_path / "a.tif") as slide, Slide(Pyramid(str(tmp_path / "a.tif")), "a.tif") as reference:
        for left, top in [(0.0, 0.0), (33.0, 121.0), (WIDTH - 68 * scale, HEIGHT - 70 * scale)]:
            tile = slide.read_tile(left, top, 64, scale).astype(int)
            expected = reference._read_box(left, top, scale, 64, 64)[0]
            assert np.abs(tile - expected).max() <= (0 if scale == 1 else 2)
        last = slide.read_tile(WIDTH - 64 * scale, HEIGHT - 64 * scale, 64, scale).astype(int)
        x, y = (edge - (63.5 - np.arange(64)) * scale for edge in (WIDTH, HEIGHT))
        assert np.abs(last - LEVELS[0][y.astype(int)[:, None], x.astype(int)]).mean() < 5
        assert np.abs(slide.thumbnail(5.3).astype(int) - reference.thumbnail(5.3))[:-2, :-2].max() <= 2
        wide = [each.read_wide(-20.0, 300.5, 64, 8.0).astype(int) for each in (slide, reference)]
        assert np.abs(wide[0] - wide[1]).max() <= 2


@pytest.fixture
def decoded(monkeypatch):
    """The storage tiles that are decoded, as JPEG."""
    decode, found = simplejpeg.decode_jpeg, []

    def counted(data, *args, **options):
        found.append(data)
        return decode(data, *args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    return found


def test_each_storage_tile_is_decoded_once(tmp_path, decoded):
    """Tiles of 96 px that overlap storage tiles of 128 px, in the order of prediction."""
    write_jpeg(tmp_path / "a.tif", LEVELS[0])
    x, y = (axis.ravel() * 96.0 + 3 for axis in np.meshgrid(np.arange(9), np.arange(7)))
    with open_slide(tmp_path / "a.tif") as slide:
        for index in curve_order(x, y):
            slide.read_tile(x[index], y[index], 96, 1.0)
    assert len(decoded) == len(set(decoded)) == 7 * 6


@pytest.mark.parametrize(("level", "left", "top"), [(1, 20, 33), (1, 260, 140), (2, 7, 11), (2, 135, 20)])
def test_between_the_seams_blended_pixels_are_those_of_openslide(tmp_path, level, left, top):
    write_jpeg(tmp_path / "a.tif", *LEVELS)
    slide, reference = both(tmp_path / "a.tif")
    _, x, y = slide.read(level, left, top, 80, 80)
    assert x % 1 > 0.002 or y % 1 > 0.002
    found, expected = (each.read(level, left, top, 80, 80)[0][..., :3] for each in (slide, reference))
    assert (found != expected).mean() < 1e-3  # rounding


def test_wide_views_decode_a_coarser_level_once(tmp_path, decoded):
    write_jpeg(tmp_path / "a.tif", *LEVELS)
    with open_slide(tmp_path / "a.tif") as slide:
        for left in range(-100, 800, 60):
            slide.read_wide(left, 0.5 * left, 64, 8.5)
    assert len(decoded) == len(set(decoded)) == len(list(storage_tiles(LEVELS[2])))


def test_memory_is_bounded_and_what_is_overwritten_is_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(jpeg_tiles, "_CACHE_BYTES", 5 * EDGE * EDGE * 3)
    write_jpeg(tmp_path / "a.tif", *LEVELS)
    slide, reference = both(tmp_path / "a.tif")
    rng = np.random.default_rng(0)
    for level, left, top in zip(rng.integers(0, 3, 60), rng.integers(0, 100, 60), rng.integers(0, 60, 60), strict=True):
        assert difference(slide, reference, level, int(left), int(top), 110, 110) <= 3  # at a seam
        assert len(slide._kept) <= 5


# ---------------------------------------------------------------- odd files

ODD_TILES = {
    "truncated": ycbcr(TENTH)[:-400],
    "no JPEG": b"garbage" * 50,
    "of another size": ycbcr(TENTH[:64, :64]),
    "much larger than stated": ycbcr(np.tile(TENTH, (4, 4, 1))),
    "of one colour": imagecodecs.jpeg8_encode(np.ascontiguousarray(TENTH[..., 0])),
}


@pytest.mark.odd
@pytest.mark.parametrize("form", ODD_TILES)
def test_a_damaged_storage_tile_is_refused_as_by_openslide(tmp_path, form):
    path = tmp_path / "a.tif"
    write_jpeg(path, *LEVELS, changed={(0, 9): ODD_TILES[form]})
    with Slide(Pyramid(str(path)), "a.tif") as reference, pytest.raises(SourceError) as expected:
        reference.read_tile(*WITHIN_TENTH, 64, 1.0)
    with open_slide(path) as slide:
        with pytest.raises(SourceError, match=r"image a\.tif cannot be read, it is damaged") as found:
            slide.read_tile(*WITHIN_TENTH, 64, 1.0)
        assert str(found.value) == str(expected.value)
        sound = slide.read_tile(300, 300, 64, 1.0)
    with Slide(Pyramid(str(path)), "a.tif") as reference:
        np.testing.assert_array_equal(sound, reference.read_tile(300, 300, 64, 1.0))


@pytest.mark.odd
@pytest.mark.parametrize(
    "options",
    [
        {"changed": {(0, 9): rgb(TENTH)}},
        {"encode": rgb, "photometric": "rgb", "changed": {(0, 9): ycbcr(TENTH)}},
        {"changed": {(0, 9): bare(ycbcr(TENTH))[1]}},
    ],
    ids=["RGB among YCbCr", "YCbCr among RGB", "without tables"],
)
def test_a_storage_tile_of_other_colours_or_without_tables_is_as_openslide_shows_it(tmp_path, options):
    write_jpeg(tmp_path / "a.tif", *LEVELS, **options)
    shown = []
    for levels in both(tmp_path / "a.tif"):
        with Slide(levels, "a.tif") as slide:
            try:
                shown.append(slide.read_tile(*WITHIN_TENTH, 64, 1.0))
            except SourceError as error:
                shown.append(str(error))
    np.testing.assert_array_equal(*shown)


def write_overlong(path):
    """Its first storage tile claims more bytes than any machine has memory."""
    write_jpeg(path, LEVELS[0], is_aperio=True, form={"bigtiff": True})
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages.first.tags["TileByteCounts"]
        tag.overwrite([2**60, *tag.value[1:]], dtype="Q")


UNUSUAL = {
    "more bytes than the file": write_overlong,
    "another compression": lambda path: write_pyramid(path, LEVELS[0]),
    "a level of another compression": write_mixed,
    "missing storage tiles": lambda path: write_jpeg(path, *LEVELS, changed={(0, 9): b""}),
    "missing storage tiles of Aperio": lambda path: write_jpeg(
        path, *LEVELS, is_aperio=True, changed={(0, 9): b"", (1, 1): b""}
    ),
    "two pages of one size": lambda path: write_jpeg(path, *LEVELS, LEVELS[2], is_aperio=True),
    "damaged tables": lambda path: write_jpeg(path, *LEVELS, **shared(ycbcr) | {"jpegtables": b"garbage"}),
}


@pytest.mark.odd
@pytest.mark.parametrize("form", UNUSUAL)
def test_unusual_pyramids_are_left_to_openslide(tmp_path, form):
    UNUSUAL[form](tmp_path / "a.tif")
    with open_slide(tmp_path / "a.tif") as slide:
        assert isinstance(slide._levels, Pyramid)


OTHER_PIXELS = {
    "grey": (LEVELS[0][..., 0], {"photometric": "minisblack"}),
    "12 bits": (LEVELS[0].astype(np.uint16), {"photometric": "rgb", "bitspersample": 12}),
    "four colours": (np.dstack([LEVELS[0], LEVELS[0][..., :1]]), {"photometric": "separated"}),
    "planes": (np.moveaxis(LEVELS[0], 2, 0), {"photometric": "rgb", "planarconfig": "separate"}),
    "strips": (LEVELS[0], {"photometric": "rgb", "tile": None, "rowsperstrip": 64}),
}


@pytest.mark.odd
@pytest.mark.parametrize("form", OTHER_PIXELS)
def test_other_pixels_are_not_decoded_here(tmp_path, form):
    image, options = OTHER_PIXELS[form]
    tifffile.imwrite(tmp_path / "a.tif", image, **{"tile": (EDGE, EDGE), "compression": "jpeg"} | options)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert jpeg_levels([(WIDTH, HEIGHT)], list(file.pages)) is None


# ---------------------------------------------------------------- real slides


@real_data
@pytest.mark.parametrize("name", ["C5_aperio", "cmu_small_region"])
def test_real_slides_are_as_openslide_shows_them(name):
    slide, reference = both(Path(os.environ["MCLSTEXP_DATA"]) / "slides" / f"{name}.svs")
    rng = np.random.default_rng(0)
    for level, (width, height) in enumerate(slide.dimensions):
        for _ in range(10):
            left, top = (int(rng.integers(0, edge - 300)) for edge in (width, height))
            assert difference(slide, reference, level, left, top, 299, 224) <= (0 if level == 0 else 2)


@real_data
def test_a_real_slide_of_jpeg_2000_is_left_to_openslide():
    path = Path(os.environ["MCLSTEXP_DATA"]) / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with open_slide(path) as slide:
        assert isinstance(slide._levels, Pyramid)
