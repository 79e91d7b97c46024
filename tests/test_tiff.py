"""TIFFs that are no scanner's format: OME-TIFF, planes, compressions and tags, read right or refused by name."""

import io
import logging

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import PLANES, TILED, UM, planes, texture, write_ome, write_pyramid

from mclstexp.errors import SourceError
from mclstexp.slides.slide import open_slide
from mclstexp.slides.tiff_levels import is_shrunken


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "tifffile")


BARE = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image '
    'ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="3" SizeT="1" SizeX="900" SizeY="700" SizeZ="1" '
    'PhysicalSizeX="0.5" PhysicalSizeY="0.5" Type="uint8"/></Image></OME>'
)
"""OME-XML as scripts with libvips write it: without channels, and without saying where the pixels are."""


def write_bare(path, *levels, subifds, **options):
    """Writes levels, images or lists of planes, in SubIFDs or as pages of their own, with the XML `BARE`."""
    with tifffile.TiffWriter(path) as tiff:
        for index, pages in enumerate(zip(*levels, strict=True)):
            first = {"description": BARE} if index == 0 else {}
            tiff.write(pages[0], subifds=len(pages) - 1 if subifds else None, metadata=None, **first, **options)
            for page in pages[1:]:
                tiff.write(page, subfiletype=1, metadata=None, **options)


def halves(image, num=2):
    """An image and its block means."""
    levels = [image]
    for _ in range(num):
        height, width = (edge // 2 * 2 for edge in levels[-1].shape[:2])
        blocks = levels[-1][:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
        levels.append(blocks.mean(axis=(1, 3)).round().astype(np.uint8))
    return levels


def opaque(image):
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


READ = {
    "levels in SubIFDs": lambda path, image: write_ome(path, *halves(image), compression="deflate"),
    "big endian BigTIFF": lambda path, image: write_ome(path, *halves(image), bigtiff=True, byteorder=">"),
    "three pages": lambda path, image: write_ome(path, planes(image), axes="CYX", **PLANES),
    "pages and SubIFDs": lambda path, image: write_ome(path, *map(planes, halves(image)), axes="CYX", **PLANES),
    "named pages": lambda path, image: write_ome(
        path, planes(image, (2, 0, 1)), axes="CYX", names=["Blue", "red", "G"], **PLANES
    ),
    "numbered pages": lambda path, image: write_ome(
        path, planes(image), axes="CYX", names=["Channel:0", "Channel:1", "Channel:2"], **PLANES
    ),
    "planes of one page": lambda path, image: write_ome(path, planes(image), axes="SYX", planarconfig="separate"),
    "JPEG 2000": lambda path, image: write_ome(path, *halves(image), compression="jpeg2000"),
    "JPEG 2000, not OME": lambda path, image: write_pyramid(path, image, compression="jpeg2000"),
    "lossless WebP": lambda path, image: write_pyramid(path, image, compression="webp", compressionargs={"level": 101}),
    "strips": lambda path, image: write_ome(path, image, tile=None, rowsperstrip=50),
    "one strip": lambda path, image: write_ome(path, image, tile=None),
    "pages of strips": lambda path, image: write_ome(
        path, planes(image), axes="CYX", tile=None, photometric="minisblack", rowsperstrip=64
    ),
    "opaque alpha": lambda path, image: write_ome(path, opaque(image), extrasamples=["unassalpha"]),
    "zstd": lambda path, image: write_ome(path, *halves(image), compression="zstd", predictor=True),
    "bare XML": lambda path, image: write_bare(path, *([level] for level in halves(image)), subifds=True, **TILED),
    "bare XML, pages": lambda path, image: write_bare(path, *map(planes, halves(image)), subifds=True, **PLANES),
    "bare XML, levels as pages": lambda path, image: write_bare(
        path, *([level] for level in halves(image)), subifds=False, **TILED
    ),
    "planes, not OME": lambda path, image: tifffile.imwrite(
        path, planes(image), **TILED, planarconfig="separate", resolution=(2, 2), resolutionunit=None
    ),
}


@pytest.mark.slow
@pytest.mark.odd
@pytest.mark.parametrize("form", READ)
def test_tiles_and_thumbnails_of_what_programs_write(tmp_path, form):
    image, path = texture(), tmp_path / "a.ome.tif"
    READ[form](path, image)
    with open_slide(path) as slide:
        assert (slide.width, slide.height) == (900, 700)
        assert slide.mpp == (pytest.approx(0.5) if form != "planes, not OME" else None)
        for left, top in [(0, 0), (333, 121), (900 - 224, 700 - 224), (127, 128)]:
            expected = image[top : top + 224, left : left + 224]
            np.testing.assert_array_equal(slide.read_tile(left, top, 224, 1.0), expected)
        for scale in (2.0, 3.3):
            with open_plain(tmp_path, image) as plain:
                tiles = [a.read_tile(60.0, 40.0, 96, scale).astype(int) for a in (slide, plain)]
            assert np.abs(tiles[0] - tiles[1]).mean() < 1.0


def open_plain(folder, image):
    Image.fromarray(image).save(folder / "plain.png")
    return open_slide(folder / "plain.png")


LOSSY = {
    "YCbCr": {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (2, 2)},
    "RGB": {"compression": "jpeg", "compressionargs": {"level": 95, "outcolorspace": "rgb"}},
    "JPEG 2000": {"compression": "jpeg2000", "compressionargs": {"level": 40, "reversible": False}},
    "JPEG 2000 of other programs": {"compression": 33005, "compressionargs": {"level": 40, "reversible": False}},
    "JPEG XL": {"compression": "jpegxl", "compressionargs": {"level": 95}},
    "three pages": {"compression": "jpeg", "compressionargs": {"level": 95}},
}


@pytest.mark.odd
@pytest.mark.parametrize("form", LOSSY)
def test_colours_of_lossy_compressions(tmp_path, form):
    image, path = texture(), tmp_path / "a.ome.tif"
    if form == "three pages":
        write_ome(path, planes(image), axes="CYX", **PLANES, **LOSSY[form])
    else:
        write_ome(path, *halves(image), **LOSSY[form])
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        tile = slide.read_tile(333, 121, 224, 1.0)
        assert np.abs(tile.astype(int) - image[121:345, 333:557]).mean() < 3


def test_levels_in_sub_ifds_are_used(tmp_path):
    """Level 1 has other pixels than level 0, so that one sees which of them a tile comes from."""
    image = texture()
    write_ome(tmp_path / "a.ome.tif", image, 255 - image[::2, ::2])
    with open_slide(tmp_path / "a.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_tile(100, 60, 64, 2.0), 255 - image[60:188:2, 100:228:2])
        np.testing.assert_array_equal(slide.read_tile(100, 60, 64, 1.0), image[60:124, 100:164])


@pytest.mark.odd
@pytest.mark.parametrize("shape", [(350, 440), (346, 450), (700, 900), (350, 225)])
def test_levels_that_are_no_shrunken_copies_are_not_used(tmp_path, shape):
    image = texture()
    write_ome(tmp_path / "a.ome.tif", image, np.zeros((*shape, 3), np.uint8))
    with open_slide(tmp_path / "a.ome.tif") as slide:
        tile = slide.read_tile(100, 60, 64, 2.0)
        assert np.abs(tile.astype(int) - image[60:188:2, 100:228:2]).mean() < 6
        assert slide.thumbnail(4.0).mean() == pytest.approx(image.mean(), rel=0.02)


def test_shrunken_copies_have_the_same_aspect():
    assert is_shrunken((50_000, 40_000), (100_001, 80_001))
    assert is_shrunken((781, 625), (100_001, 80_001))
    assert not is_shrunken((50_000, 40_010), (100_001, 80_001))
    assert not is_shrunken((100, 80), (100, 80))
    assert not is_shrunken((80, 100), (200, 160))


# ---------------------------------------------------------------- resolution


@pytest.mark.odd
@pytest.mark.parametrize(
    ("size", "unit"),
    [
        *[(0.25, "µm"), (0.25, "μm"), (0.25, "um"), (250.0, "nm"), (2500.0, "Å"), (250_000.0, "pm")],
        *[(2.5e-4, "mm"), (2.5e-5, "cm"), (2.5e-7, "m"), (0.25 / 25400, "inch"), (0.25 / 25400, "in"), (0.25, None)],
    ],
)
def test_physical_sizes_are_converted(tmp_path, size, unit):
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    write_ome(tmp_path / "a.tif", texture(64, 64), sizes={"PhysicalSizeX": size, "PhysicalSizeY": size} | units)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(0.25)


@pytest.mark.odd
@pytest.mark.parametrize(
    ("sizes", "mpp"),
    [
        ({}, None),
        ({"PhysicalSizeX": 0.5}, 0.5),
        (UM | {"PhysicalSizeXUnit": "pixel", "PhysicalSizeYUnit": "pixel"}, None),
        (UM | {"PhysicalSizeXUnit": "reference frame", "PhysicalSizeYUnit": "reference frame"}, None),
        (UM | {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}, 0.5),  # each axis has its unit
        ({"PhysicalSizeX": 264.6, "PhysicalSizeY": 264.6}, None),  # a screen's pixels
    ],
)
def test_odd_physical_sizes(tmp_path, sizes, mpp):
    write_ome(tmp_path / "a.tif", texture(64, 64), sizes=sizes)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


@pytest.mark.odd
@pytest.mark.parametrize(
    ("sizes", "tags", "message"),
    [
        (UM | {"PhysicalSizeY": 0.25}, {}, r"pixels are not square: \[0.5, 0.25\]"),
        (UM | {"PhysicalSizeYUnit": "nm"}, {}, "pixels are not square"),
        (UM | {"PhysicalSizeX": -1}, {}, "its resolution is"),
        (UM | {"PhysicalSizeXUnit": "furlong"}, {}, r"unit 'furlong'; known are .*µm"),
        (UM, {"resolution": (10000, 10000), "resolutionunit": "CENTIMETER"}, r"0\.5 in the OME-XML and 1 in the resol"),
    ],
)
def test_contradictory_physical_sizes_are_refused(tmp_path, sizes, tags, message):
    write_ome(tmp_path / "a.tif", texture(64, 64), sizes=sizes, **tags)
    with pytest.raises(SourceError, match=rf"image a\.tif: .*{message}"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.odd
@pytest.mark.parametrize("tile", [(128, 128), None])
@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        *[((20_000, 20_000), "CENTIMETER", 0.5), ((50_800, 50_800), "INCH", 0.5), ((20_000, 20_000), "NONE", None)],
        *[((0, 0), "CENTIMETER", None), ((72, 72), "INCH", None), ((1, 1), "NONE", None)],
    ],
)
def test_resolution_tags(tmp_path, tile, resolution, unit, mpp):
    options = {"resolution": resolution, "resolutionunit": unit, "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", texture(200, 200), tile=tile, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


@pytest.mark.odd
@pytest.mark.parametrize(("unit", "per_unit"), [("um", 2), ("micron", 2), ("\\u00B5m", 2), ("mm", 2000), ("cm", 20000)])
def test_imagej_states_its_unit_in_words(tmp_path, unit, per_unit):
    metadata = {"unit": unit, "axes": "YXS"}
    tifffile.imwrite(
        tmp_path / "a.tif", texture(64, 64), imagej=True, resolution=(per_unit, per_unit), metadata=metadata
    )
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(0.5)
        np.testing.assert_array_equal(slide.read_tile(0, 0, 64, 1.0), texture(64, 64))


def write_aperio(path, image, mpp, **tags):
    description = f"Aperio Image Library v11.2.1\n{image.shape[1]}x{image.shape[0]} (256x256) JPEG/RGB|AppMag = 20"
    description += f"|MPP = {mpp}" if mpp else ""
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", description=description, metadata=None, **tags)


@pytest.mark.odd
def test_an_aperio_slide_that_contradicts_itself_is_refused(tmp_path):
    per_cm = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    write_aperio(tmp_path / "a.svs", texture(), 0.5, **per_cm)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.mpp == pytest.approx(0.5)
    write_aperio(tmp_path / "b.svs", texture(), 0.25, **per_cm)
    with pytest.raises(SourceError, match=r"b\.svs: mpp is 0\.25 in the image description and 0\.5 in the resolution"):
        open_slide(tmp_path / "b.svs")


# ---------------------------------------------------------------- orientation

ORIENTED = {
    "tiles": lambda path, image, tag: write_pyramid(path, image, extratags=tag),
    "JPEG tiles": lambda path, image, tag: write_pyramid(path, image, compression="jpeg", extratags=tag),
    "strips": lambda path, image, tag: tifffile.imwrite(path, image, photometric="rgb", extratags=tag),
    "OME": lambda path, image, tag: write_ome(path, image, extratags=tag),
    "Aperio": lambda path, image, tag: write_aperio(path, image, 0.5, extratags=tag),
}


@pytest.mark.odd
@pytest.mark.parametrize("form", ORIENTED)
@pytest.mark.parametrize("value", range(2, 9))
def test_turned_slides_are_refused(tmp_path, form, value):
    ORIENTED[form](tmp_path / "a.tif", texture(200, 300), [(274, 3, 1, value, True)])
    with pytest.raises(SourceError, match=rf"a\.tif: its TIFF orientation is {value}, .*: write its pixels again"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("form", ORIENTED)
def test_upright_slides_are_read(tmp_path, form):
    image = texture(200, 300)
    ORIENTED[form](tmp_path / "a.tif", image, [(274, 3, 1, 1, True)])
    with open_slide(tmp_path / "a.tif") as slide:
        error = np.abs(slide.read_tile(30, 40, 96, 1.0).astype(int) - image[40:136, 30:126]).mean()
        assert error < (2 if form == "JPEG tiles" else 1e-9)


# ---------------------------------------------------------------- refused


def several(path, *images):
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for image in images:
            tiff.write(image, metadata={"axes": "YXS"} | UM, **TILED)


IMAGE = texture(300, 400)
REFUSED = {
    "depth": (lambda p: write_ome(p, np.stack([IMAGE] * 4), axes="ZYXS"), "several images, 4 along depth"),
    "time": (lambda p: write_ome(p, np.stack([IMAGE] * 2), axes="TYXS"), "several images, 2 along time"),
    "grey depth": (lambda p: write_ome(p, planes(IMAGE), axes="ZYX", **PLANES), "several images, 3 along depth"),
    "two scenes": (lambda p: several(p, IMAGE, texture(310, 400)), "several images .*400 x 310 px, 400 x 300 px"),
    "16 bits": (lambda p: write_ome(p, IMAGE.astype(np.uint16)), "colour mode is 3 x 16 bit RGB"),
    "16 bits, not OME": (
        lambda p: tifffile.imwrite(p, IMAGE.astype(np.uint16), **TILED),
        "colour mode is 3 x 16 bit RGB",
    ),
    "float": (lambda p: write_ome(p, IMAGE.astype(np.float32)), "colour mode is 3 x 32 bit RGB"),
    "grey": (lambda p: write_ome(p, IMAGE[..., 0], axes="YX", **PLANES), "MINISBLACK .greyscale."),
    "grey, not OME": (lambda p: tifffile.imwrite(p, IMAGE[..., 0], **PLANES), "MINISBLACK .greyscale."),
    "grey pages, not OME": (lambda p: tifffile.imwrite(p, planes(IMAGE), **PLANES), "several images, 3 along"),
    "slices, not OME": (lambda p: tifffile.imwrite(p, np.stack([IMAGE] * 3), **TILED), "several images, 3 along"),
    "five stains": (
        lambda p: write_ome(p, np.stack([IMAGE[..., 0]] * 5), axes="CYX", **PLANES),
        "colour mode is 5 x 8 bit MINISBLACK",
    ),
    "two stains": (
        lambda p: write_ome(p, np.stack([IMAGE[..., 0]] * 2), axes="CYX", **PLANES),
        "colour mode is 2 x 8 bit MINISBLACK",
    ),
    "three stains": (
        lambda p: write_ome(p, planes(IMAGE), axes="CYX", names=["DAPI", "CD3", "CD8"], **PLANES),
        "channels are DAPI, CD3, CD8, not red, green and blue",
    ),
    "a fourth channel": (
        lambda p: tifffile.imwrite(p, opaque(IMAGE), extrasamples=["unspecified"], **TILED),
        "colour mode is 4 x 8 bit RGB",
    ),
    "CMYK": (lambda p: tifffile.imwrite(p, opaque(IMAGE), tile=(128, 128), photometric="separated"), "SEPARATED"),
    "CIELab": (lambda p: tifffile.imwrite(p, IMAGE, tile=(128, 128), photometric="cielab"), "CIELAB"),
    "XML of another image": (
        lambda p: tifffile.imwrite(p, IMAGE, description=XML.format(x=99), metadata=None, **TILED),
        "describes images of 99 x 300 px; its image has 400 x 300 px",
    ),
    "damaged XML": (
        lambda p: tifffile.imwrite(p, IMAGE, description=XML.format(x="400\x22 &"), metadata=None, **TILED),
        "OME-XML is damaged",
    ),
    "planes elsewhere": (
        lambda p: tifffile.imwrite(p, IMAGE[..., 0], description=ELSEWHERE, metadata=None, **PLANES),
        "not in this file",
    ),
}
XML = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{x}" SizeY="300" SizeC="3" SizeZ="1" SizeT="1">'
    '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
)
ELSEWHERE = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
    '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="400" SizeY="300" SizeC="3" '
    'SizeZ="1" SizeT="1"><Channel ID="Channel:0:0"/><Channel ID="Channel:0:1"/><Channel ID="Channel:0:2"/>'
    '<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.tif">urn:uuid:1</UUID></TiffData>'
    '<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="b.tif">urn:uuid:2</UUID></TiffData>'
    '<TiffData FirstC="2" IFD="0" PlaneCount="1"><UUID FileName="c.tif">urn:uuid:3</UUID></TiffData>'
    "</Pixels></Image></OME>"
)


@pytest.mark.odd
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_one_colour_image_is_refused_by_name(tmp_path, kind):
    write, message = REFUSED[kind]
    write(tmp_path / "a.tif")
    with pytest.raises(SourceError, match=rf"image a\.tif.*{message}"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.odd
def test_a_thumbnail_of_another_aspect_is_passed_over(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(texture(), metadata=None, **TILED)
        tiff.write(texture(350, 500), metadata=None, photometric="rgb", subfiletype=1)
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read_tile(333, 121, 224, 1.0), texture()[121:345, 333:557])


@pytest.mark.odd
def test_labels_and_shrunken_copies_beside_the_slide_are_passed_over(tmp_path):
    image = texture()
    several(tmp_path / "a.tif", texture(90, 120), image, image[::2, ::2])
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.width, slide.height, slide.mpp) == (900, 700, 0.5)
        np.testing.assert_array_equal(slide.read_tile(333, 121, 224, 1.0), image[121:345, 333:557])


# ---------------------------------------------------------------- damage


@pytest.mark.odd
@pytest.mark.parametrize("form", ["levels in SubIFDs", "three pages", "JPEG 2000", "strips", "planes of one page"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_truncated_slides_are_refused(tmp_path, form, share):
    path = tmp_path / "a.tif"
    READ[form](path, texture())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SourceError, match=r"image a\.tif"), open_slide(path) as slide:
        slide.thumbnail(1.0)


@pytest.mark.odd
@pytest.mark.parametrize("form", ["levels in SubIFDs", "pages and SubIFDs", "JPEG 2000"])
def test_damaged_bytes_are_refused_or_leave_the_place_right(tmp_path, form):
    """Whatever byte is wrong, a slide is read or refused: nothing else is raised, and nothing hangs."""
    path, random = tmp_path / "a.tif", np.random.default_rng(0)
    READ[form](path, texture(256, 256))
    whole = path.read_bytes()
    for place in [*range(4, 300, 7), *random.integers(0, len(whole), 30)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            with open_slide(path) as slide:
                assert slide.thumbnail(2.0).shape == (slide.height // 2, slide.width // 2, 3)
        except SourceError:
            pass


@pytest.mark.odd
def test_a_tile_that_was_not_stored_is_missing(tmp_path):
    path = tmp_path / "a.tif"
    write_ome(path, texture())
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    with open_slide(path) as slide:
        assert slide.read_tile(100, 100, 64, 1.0) is None
        np.testing.assert_array_equal(slide.read_tile(128, 128, 64, 1.0), texture()[128:192, 128:192])
        assert slide.thumbnail(4.0)[:30, :30].min() == 255


@pytest.mark.odd
@pytest.mark.parametrize("write", [write_ome, write_pyramid])
def test_giant_storage_tiles_are_refused_before_they_are_decoded(tmp_path, write):
    """OpenSlide would end the process."""
    write(tmp_path / "a.tif", texture(200, 200))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        for name in ("TileWidth", "TileLength"):
            tiff.pages[0].tags[name].overwrite(16_384)
    with pytest.raises(SourceError, match=r"a storage tile has 268435456 px; at most 67108864 are allowed: convert"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.odd
def test_giant_strips_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("mclstexp.slides.tiff.MAX_PLAIN_PX", 10_000)
    write_ome(tmp_path / "a.tif", texture(200, 200), tile=None)
    with pytest.raises(SourceError, match="its image in strips has 40000 px; at most 10000 are allowed: convert"):
        open_slide(tmp_path / "a.tif")


# ---------------------------------------------------------------- content, not name


@pytest.mark.odd
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "JPEG2000"])
def test_an_image_is_read_by_its_content(tmp_path, kind):
    image, buffer = texture(200, 300), io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    (tmp_path / "a.tif").write_bytes(buffer.getvalue())
    with open_slide(tmp_path / "a.tif") as slide:
        assert np.abs(slide.read_tile(20, 30, 96, 1.0).astype(int) - image[30:126, 20:116]).mean() < 3
