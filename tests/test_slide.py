"""Slides: exact crops, exact resampling, one behaviour over pyramids and plain images, damage refused."""

import errno
import gzip
import io
import itertools
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slide_files import texture, write_plain, write_pyramid

from mclstexp.errors import SourceError, StorageError
from mclstexp.slides import slide
from mclstexp.slides.plain import is_packed
from mclstexp.slides.pyramid import scanned_from
from mclstexp.slides.slide import open_slide

real_data = pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
WRITERS = {
    "pyramid.tif": write_pyramid,
    "plain.tif": write_plain,
    "plain.png": write_plain,
}


@pytest.fixture(params=WRITERS)
def lossless(request, tmp_path):
    path = tmp_path / request.param
    WRITERS[request.param](path, texture())
    return path


def test_native_tiles_are_exact_crops(lossless):
    image = texture()
    with open_slide(lossless) as slide:
        assert (slide.width, slide.height) == (900, 700)
        for left, top in [(0, 0), (333, 121), (900 - 224, 700 - 224), (127, 128)]:
            tile = slide.read_tile(left, top, 224, 1.0)
            assert tile.dtype == np.uint8
            np.testing.assert_array_equal(tile, image[top : top + 224, left : left + 224])


def sampled(left, top, size, scale):
    """The field's own values at the tile's pixel centres."""
    y = top + (np.arange(size)[:, None] + 0.5) * scale
    x = left + (np.arange(size)[None] + 0.5) * scale
    waves = [128 + 100 * np.sin(x / (29 + 7 * c) + c) * np.cos(y / (37 + 5 * c)) for c in range(3)]
    return np.stack(waves, axis=2)


@pytest.mark.parametrize("scale", [0.5, 1.37, 2.0, 3.3, 4.0, 6.1])
def test_resampled_tiles_are_where_the_mpp_puts_them(lossless, scale):
    size = 64
    with open_slide(lossless) as slide:
        for left, top in [(0.0, 0.0), (100.25, 37.75), (900 - size * scale, 700 - size * scale)]:
            tile = slide.read_tile(left, top, size, scale).astype(float)
            inner = np.abs(tile - sampled(left, top, size, scale))[3:-3, 3:-3]
            shifted = np.abs(tile - sampled(left + max(scale, 2), top + max(scale, 2), size, scale))[3:-3, 3:-3]
            assert inner.mean() < 1.5
            assert inner.mean() < 0.5 * shifted.mean()


def test_pyramid_and_plain_image_agree(tmp_path):
    write_pyramid(tmp_path / "a.tif", texture())
    write_plain(tmp_path / "a.png", texture())
    with open_slide(tmp_path / "a.tif") as pyramid, open_slide(tmp_path / "a.png") as plain:
        for scale in (1.0, 1.7, 2.0, 5.0):
            tiles = [slide.read_tile(60.0, 40.0, 96, scale).astype(int) for slide in (pyramid, plain)]
            assert np.abs(tiles[0] - tiles[1]).mean() < 1.0
        thumbnails = [slide.thumbnail(7.3) for slide in (pyramid, plain)]
        assert thumbnails[0].shape == thumbnails[1].shape == (95, 123, 3)
        assert np.abs(thumbnails[0].astype(int) - thumbnails[1]).mean() < 1.5


def test_thumbnail_is_read_in_bounded_parts(lossless, monkeypatch):
    with open_slide(lossless) as slide:
        whole = slide.thumbnail(9.0)
        monkeypatch.setattr("mclstexp.slides.slide._MAX_REGION_PX", 200)
        parts = slide.thumbnail(9.0)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_missing_pixels_are_neither_tissue_nor_background(tmp_path):
    """OpenSlide paints missing tiles transparent; a tile over one is reported missing, not white."""
    path = tmp_path / "holes.tif"
    write_pyramid(path, texture(), num_levels=1)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        counts = list(tag.value)
    counts[0] = 0
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    with open_slide(path) as slide:
        assert slide.read_tile(0, 0, 64, 1.0) is None
        assert slide.read_tile(100, 100, 64, 1.0) is None
        assert slide.read_tile(128, 128, 64, 1.0) is not None
        assert slide.thumbnail(4.0)[:30, :30].min() == 255


def test_seams_of_a_coarser_level_are_no_missing_pixels(tmp_path):
    """A level of odd edges is not shrunk by a whole factor, and OpenSlide's seams in it are hardly transparent."""
    image = texture(701, 901)
    write_pyramid(tmp_path / "a.tif", image)
    with open_slide(tmp_path / "a.tif") as slide:
        for left, top in itertools.product(range(0, 760, 40), range(0, 560, 40)):
            tile = slide.read_tile(float(left), float(top), 64, 2.0)
            crop = image[top : top + 128, left : left + 128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
            assert np.abs(tile - crop).mean() < 2


# ---------------------------------------------------------------- resolution


def test_mpp_of_files(tmp_path):
    image = texture(200, 200)
    write_pyramid(tmp_path / "a.tif", image, num_levels=1, mpp=0.4)
    write_plain(tmp_path / "b.tif", image, dpi=(25400, 25400))
    write_plain(tmp_path / "c.jpg", image, dpi=(72, 72))
    write_plain(tmp_path / "d.png", image)
    found = []
    for name in ("a.tif", "b.tif", "c.jpg", "d.png"):
        with open_slide(tmp_path / name) as slide:
            found.append(slide.mpp)
    assert found == [pytest.approx(0.4), pytest.approx(1.0), None, None]


def test_pixels_that_are_not_square_are_refused(tmp_path):
    write_pyramid(tmp_path / "a.tif", texture(200, 200), num_levels=1, resolution=(20000, 10000))
    with pytest.raises(SourceError, match=r"a\.tif: its pixels are not square"):
        open_slide(tmp_path / "a.tif")


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "I;16", "LA", "F"])
def test_other_colour_modes_are_refused(tmp_path, mode):
    image = Image.new(mode, (64, 64)) if mode in ("I;16", "F") else Image.fromarray(texture(64, 64)).convert(mode)
    image.save(tmp_path / "a.tif")
    with pytest.raises(SourceError, match="colour mode is"):
        open_slide(tmp_path / "a.tif")


def test_palettes_and_opaque_alpha_become_rgb(tmp_path):
    image = texture(64, 64)
    Image.fromarray(image).convert("RGBA").save(tmp_path / "rgba.png")
    palette = Image.fromarray(image).quantize(200)
    palette.save(tmp_path / "p.png")
    for name, expected in (("rgba.png", image), ("p.png", np.asarray(palette.convert("RGB")))):
        with open_slide(tmp_path / name) as slide:
            np.testing.assert_array_equal(slide.read_tile(0, 0, 64, 1.0), expected)


def test_transparent_pixels_are_refused(tmp_path):
    image = np.dstack([texture(64, 64), np.full((64, 64), 255, np.uint8)])
    image[3, 5, 3] = 254
    Image.fromarray(image).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(SourceError, match="transparent pixels"):
        slide.read_tile(0, 0, 32, 1.0)


@pytest.mark.parametrize("orientation", [3, 6])
def test_rotated_images_are_refused(tmp_path, orientation):
    image = Image.fromarray(texture(64, 64))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(SourceError, match=f"EXIF orientation is {orientation}"):
        open_slide(tmp_path / "a.jpg")


def test_several_images_in_one_file_are_refused(tmp_path):
    pages = [Image.fromarray(texture(64, 64, seed)) for seed in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(SourceError, match="several images"):
        open_slide(tmp_path / "a.tif")


# ---------------------------------------------------------------- JPEG 2000


def jp2(image, per_metre=None):
    """A lossless JP2 file; `per_metre` pixels are stated in its box of the resolution at capture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG2000")
    data = buffer.getvalue()
    if per_metre is None:
        return data
    resolution = struct.pack(">HHHHbb", per_metre // 100, 1, per_metre // 100, 1, 2, 2)
    box = struct.pack(">I4sI4s", 26, b"res ", 18, b"resc") + resolution
    start = data.index(b"jp2h") - 4
    end = start + int.from_bytes(data[start : start + 4])
    return data[:start] + struct.pack(">I", end - start + len(box)) + data[start + 4 : end] + box + data[end:]


@pytest.mark.odd
@pytest.mark.parametrize(("per_metre", "mpp"), [(None, None), (2_000_000, 0.5), (4_000_000, 0.25), (2800, None)])
def test_jpeg_2000_is_read_with_its_resolution(tmp_path, per_metre, mpp):
    image = texture(300, 400)
    (tmp_path / "a.jp2").write_bytes(jp2(image, per_metre))
    with open_slide(tmp_path / "a.jp2") as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-3))
        np.testing.assert_array_equal(slide.read_tile(33, 21, 224, 1.0), image[21:245, 33:257])


@pytest.mark.odd
@pytest.mark.parametrize("form", ["codestream", "opaque alpha", "12 bits", "16 bits", "wrong name"])
def test_other_jpeg_2000_is_read(tmp_path, form):
    image = texture(300, 400)
    deep = image.astype(np.uint16)
    content = {
        "codestream": imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k"),
        "opaque alpha": jp2(np.dstack([image, np.full((300, 400), 255, np.uint8)])),
        "12 bits": imagecodecs.jpeg2k_encode(deep * 16, level=0, bitspersample=12),
        "16 bits": imagecodecs.jpeg2k_encode(deep * 256, level=0),
        "wrong name": jp2(image),
    }[form]
    path = tmp_path / ("a.svs" if form == "wrong name" else "a.jp2")
    path.write_bytes(content)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_tile(33, 21, 224, 1.0), image[21:245, 33:257])


@pytest.mark.odd
@pytest.mark.parametrize("form", ["grey", "transparent", "five channels", "cut", "giant"])
def test_jpeg_2000_without_plain_colours_is_refused(tmp_path, form, monkeypatch):
    image = texture(300, 400)
    content, message = {
        "grey": (jp2(image[..., 0]), r"colour mode is L \(greyscale\)"),
        "transparent": (jp2(np.dstack([image, image[..., 0]])), "transparent pixels"),
        "five channels": (imagecodecs.jpeg2k_encode(np.dstack([image, image[..., :2]]), level=0), "cannot be read"),
        "cut": (jp2(image)[:-5000], "damaged"),
        "giant": (jp2(image), "at most 10000 are allowed"),
    }[form]
    if form == "giant":
        monkeypatch.setattr("mclstexp.slides.plain.MAX_PLAIN_PX", 10_000)
    (tmp_path / "a.jp2").write_bytes(content)
    with pytest.raises(SourceError, match=rf"image a\.jp2.*{message}"), open_slide(tmp_path / "a.jp2") as slide:
        slide.thumbnail(1.0)


# ---------------------------------------------------------------- damage and size


def claimed_png(width, height):
    """A PNG of a few bytes that claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(40_000, 40_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_giant_images_are_refused_before_they_are_decoded(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(claimed_png(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match=r"bomb\.png: it has .* px; at most 1073741824 are allowed in all"):
        open_slide(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "pyramid.tif"])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.1])
def test_truncated_images_are_refused(tmp_path, name, share):
    path = tmp_path / name
    (write_pyramid if name == "pyramid.tif" else write_plain)(path, texture())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])

    def read_everything():
        with open_slide(path) as slide:
            return [slide.read_tile(x, y, 100, 1.0) for x in range(0, 801, 100) for y in range(0, 601, 100)]

    with pytest.raises(SourceError, match=f"image {name}"):
        read_everything()


@pytest.mark.parametrize("content", [b"", b"garbage" * 500, b"%PDF-1.7 ...", b"GIF89a" + bytes(100)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.svs").write_bytes(content)
    with pytest.raises(SourceError, match=r"image a\.svs"):
        open_slide(tmp_path / "a.svs")


def test_pillows_limit_is_restored(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    write_plain(tmp_path / "a.png", texture(64, 64))
    with open_slide(tmp_path / "a.png") as slide:
        slide.read_tile(0, 0, 32, 1.0)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["large.tif", "large.ome.tif"])
def test_memory_does_not_grow_with_a_pyramid(tmp_path, name):
    """A slide of 268 MB of pixels (as OpenSlide hands them on) is read within a fraction of that."""
    path = tmp_path / name
    tile = texture(512, 512)
    with tifffile.TiffWriter(path) as tiff:
        tiles = (tile for _ in range(16 * 16))
        tiff.write(tiles, shape=(8192, 8192, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb", compression="jpeg")
    code = (
        "import resource, sys; from mclstexp.slides.slide import open_slide; slide = open_slide(sys.argv[1]);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "slide.read_tile(5000, 5000, 224, 1.0); slide.thumbnail(16.0);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'platform'}"}
    grown = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, check=True)
    assert int(grown.stdout) < 130_000  # KiB


@real_data
def test_real_slides():
    folder = Path(os.environ["MCLSTEXP_DATA"]) / "slides"
    with open_slide(folder / "cmu_small_region.svs") as slide:
        assert slide.mpp == pytest.approx(0.499)
        reference = openslide.OpenSlide(str(folder / "cmu_small_region.svs")).read_region((700, 900), 0, (224, 224))
        np.testing.assert_array_equal(slide.read_tile(700, 900, 224, 1.0), np.asarray(reference)[..., :3])
    with open_slide(folder / "tcga-cr-7395-01a-01-ts1.svs") as slide:
        assert slide.mpp is None
        assert slide.read_tile(1000, 1000, 224, 2.0).shape == (224, 224, 3)


@real_data
def test_a_real_section_as_pyramid_and_as_jpeg_show_the_same():
    root = Path(os.environ["MCLSTEXP_DATA"])
    with (
        open_slide(root / "slides" / "C5_aperio.svs") as svs,
        open_slide(root / "her2st" / "images" / "C5.jpg") as jpeg,
    ):
        assert (svs.width, svs.height) == (jpeg.width, jpeg.height)
        for scale in (1.0, 3.5):
            tiles = [slide.read_tile(2500.0, 2500.0, 224, scale).astype(float) for slide in (svs, jpeg)]
            assert np.corrcoef(tiles[0].ravel(), tiles[1].ravel())[0, 1] > 0.97


def test_a_lost_file_is_not_a_damaged_slide(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^gone\.svs$"):
        open_slide(tmp_path / "gone.svs")

    def stale(*_args, **_options):
        raise OSError(errno.ESTALE, "Stale file handle")

    write_plain(tmp_path / "a.png", texture())
    monkeypatch.setattr(slide, "open", stale, raising=False)
    with pytest.raises(StorageError, match=r"image a.png cannot be read now: \[Errno 116\] Stale file handle"):
        open_slide(tmp_path / "a.png")


def test_where_the_scanned_region_begins():
    assert scanned_from({}) == (0, 0)
    assert scanned_from({"openslide.bounds-x": "30000", "openslide.bounds-y": "1200"}) == (30000, 1200)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))


def packed(path: Path) -> Path:
    copy = path.with_name(f"{path.name}.gz")
    copy.write_bytes(gzip.compress(path.read_bytes()))
    return copy


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_packed_image_is_read_as_the_plain_one(noise: Image.Image, tmp_path: Path, kind: str) -> None:
    plain = tmp_path / f"a.{kind}"
    noise.save(plain, dpi=(25400 / 0.5, 25400 / 0.5))
    copy = packed(plain)
    assert is_packed(copy)
    assert not is_packed(plain)
    with open_slide(plain) as expected, open_slide(copy) as found:
        assert (found.width, found.height) == (400, 300)
        assert found.mpp == expected.mpp == pytest.approx(0.5, rel=1e-3)
        for corner in ((10, 20), (300, 200), (0, 0)):
            np.testing.assert_array_equal(found.read_tile(*corner, 64, 1.0), expected.read_tile(*corner, 64, 1.0))
        np.testing.assert_array_equal(found.thumbnail(4.0), expected.thumbnail(4.0))


@pytest.mark.parametrize("kept", [30, 1000, -4])
def test_a_truncated_packed_image_is_refused(noise: Image.Image, tmp_path: Path, kept: int) -> None:
    noise.save(tmp_path / "a.jpg")
    copy = packed(tmp_path / "a.jpg")
    copy.write_bytes(copy.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"image a\.jpg\.gz cannot be read, it is damaged"), open_slide(copy) as cut:
        cut.thumbnail(1.0)


def test_other_packed_files_are_refused_with_what_to_do(noise: Image.Image, tmp_path: Path) -> None:
    noise.save(tmp_path / "a.tif")
    with pytest.raises(
        SourceError, match=r"image a\.tif\.gz: it is compressed by gzip and contains no JPEG or PNG; decompress"
    ):
        open_slide(packed(tmp_path / "a.tif"))
