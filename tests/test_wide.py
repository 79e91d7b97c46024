"""Wide tiles: the whole plane around a spot, equal to an area-weighted resample of all pixels, read once."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from slide_files import texture, write_ome, write_plain, write_pyramid
from wide_reference import reference

from mclstexp.errors import SourceError
from mclstexp.slides import blocks
from mclstexp.slides.slide import open_slide
from mclstexp.slides.tiles import tile_corner

SIZE = 32


@cache
def speckled():
    """Waves with noise on every pixel, which careless shrinking would turn into other noise; 360 x 440 px."""
    noise = np.random.default_rng(0).normal(0, 30, (360, 440, 3))
    return (texture(360, 440) + noise).clip(0, 255).round().astype(np.uint8)


@cache
def expected(left, top, scale):
    """The reference, which all kinds of files share."""
    return reference(speckled(), left, top, SIZE, scale)


def write_jpeg(path, image):
    write_plain(path, image, quality=100, subsampling=0)


def write_strips(path, image):
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=16, compression="zlib")


def write_single(path, image):
    write_pyramid(path, image, num_levels=1)


def write_ome_levels(path, image):
    write_ome(path, image, image.reshape(180, 2, 220, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8))


KINDS = {
    "pyramid.tif": write_pyramid,
    "single.tif": write_single,
    "strips.tif": write_strips,
    "plain.png": write_plain,
    "plain.jpg": write_jpeg,
    "levels.ome.tif": write_ome_levels,
}


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    KINDS[request.param](tmp_path / request.param, speckled())
    return tmp_path / request.param


@pytest.mark.parametrize("scale", [1.0, 1.7, 4.0, 8.3, 21.0])
def test_a_wide_tile_is_the_resampled_plane_around_the_slide(path, scale):
    """Within 1.5 grey values on average and 7 at the most, where pixels have noise of 30."""
    edge = SIZE * scale
    with open_slide(path) as slide:
        for left, top in [
            (10.0, 20.0),
            (200.25 - edge / 2, 150.5 - edge / 2),
            (-0.4 * edge, 0.3),
            (440 - 0.7 * edge, 250.0),
        ]:
            tile = slide.read_wide(left, top, SIZE, scale)
            off = np.abs(tile - expected(left, top, scale))
            assert (tile.shape, tile.dtype) == ((SIZE, SIZE, 3), np.uint8)
            assert off.mean() < 1.5
            assert off.max() < 7.0


def test_neighbours_and_one_tile_alone_are_the_same(path):
    """What was read before, and from which blocks, does not matter."""
    with open_slide(path) as slide:
        near = [slide.read_wide(left, 100.0, SIZE, 8.0) for left in (0.0, 40.0, 200.0, 40.0)]
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_wide(40.0, 100.0, SIZE, 8.0), near[1])
    np.testing.assert_array_equal(near[1], near[3])


def test_a_plain_image_is_shrunk_once(tmp_path, monkeypatch):
    write_plain(tmp_path / "a.png", speckled())
    shrunk = []
    reduce = Image.Image.reduce
    monkeypatch.setattr(blocks.Image.Image, "reduce", lambda self, by: shrunk.append(self.size) or reduce(self, by))
    with open_slide(tmp_path / "a.png") as slide:
        for left in range(0, 300, 20):
            slide.read_wide(float(left), float(left), SIZE, 8.0)
    assert shrunk == [(1024, 1024)], "the only block of a 440 x 360 image that is shrunk 4 times"


def test_missing_pixels_are_background(tmp_path):
    path = tmp_path / "holes.tif"
    write_single(path, np.full((360, 440, 3), 90, np.uint8))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    with open_slide(path) as slide:
        tile = slide.read_wide(0.0, 0.0, SIZE, 8.0)
    assert (tile[:14, :14] == 240).all()
    assert (tile[18:, 18:] == 90).all()


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.png"
    write_plain(path, speckled())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"a\.png"), open_slide(path) as slide:
        slide.read_wide(0.0, 0.0, SIZE, 8.0)


@pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
def test_a_real_section_as_pyramid_and_as_jpeg_is_the_same_from_afar():
    """Within 4 grey levels on average, where a shift by one pixel is 6 to 21; both files are lossy."""
    root, size = Path(os.environ["MCLSTEXP_DATA"]), 112
    spots = pd.read_csv(root / "her2st" / "spots" / "C5_selection.tsv", sep="\t")[["pixel_x", "pixel_y"]].to_numpy()
    with (
        open_slide(root / "slides" / "C5_aperio.svs") as svs,
        open_slide(root / "her2st" / "images" / "C5.jpg") as jpeg,
    ):
        scale = 618 / size / svs.mpp
        for left, top in tile_corner(spots[::20], size, scale):
            one, other = (slide.read_wide(left, top, size, scale).astype(float) for slide in (svs, jpeg))
            off, shifted = (np.abs(one - side).mean() for side in (other, np.roll(other, 1, axis=1)))
            assert off < 4
            assert shifted > 1.5 * off
