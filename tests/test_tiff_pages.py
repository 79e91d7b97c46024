"""TIFFs of several pages in any order, names of channels and units, and files that are no image."""

import numpy as np
import pytest
import tifffile
from slide_files import PLANES, planes, texture, write_ome

from mclstexp.errors import SourceError
from mclstexp.slides.slide import open_slide


def write_pages(path, *pages, **options):
    """Writes images as pages, each with its flag of a reduced image."""
    with tifffile.TiffWriter(path) as tiff:
        for image, reduced in pages:
            tiff.write(image, photometric="rgb", subfiletype=reduced, metadata=None, **options)


IN_ANY_ORDER = {
    "small page first": lambda image: [(image[::4, ::4], 0), (image, 0)],
    "levels upwards": lambda image: [(image[::4, ::4], 1), (image[::2, ::2], 1), (image, 0)],
    "levels upwards, no flags": lambda image: [(image[::4, ::4], 0), (image[::2, ::2], 0), (image, 0)],
    "label first": lambda image: [(texture(100, 300), 0), (image, 0)],
    "thumbnail last": lambda image: [(image, 0), (image[::4, ::4], 1)],
}


@pytest.mark.odd
@pytest.mark.parametrize("tile", [(128, 128), None], ids=["tiles", "strips"])
@pytest.mark.parametrize("order", IN_ANY_ORDER)
def test_the_slide_is_the_largest_page_wherever_it_is(tmp_path, order, tile):
    """OpenSlide takes the first page, and positions would be in pixels of another one."""
    image = texture()
    write_pages(tmp_path / "a.tif", *IN_ANY_ORDER[order](image), tile=tile, resolution=(2e4, 2e4), resolutionunit=3)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.width, slide.height, slide.mpp) == (900, 700, pytest.approx(0.5))
        np.testing.assert_array_equal(slide.read_tile(333, 121, 224, 1.0), image[121:345, 333:557])
        assert np.abs(slide.thumbnail(8.0).mean() - image.mean()) < 1


@pytest.mark.odd
def test_a_mask_beside_the_slide_is_passed_over(tmp_path):
    """As GDAL writes it into cloud-optimised TIFFs."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(texture(), photometric="rgb", tile=(128, 128), metadata=None)
        mask = np.ones((700, 900), bool)
        tiff.write(mask, photometric="mask", tile=(128, 128), subfiletype=4, metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.width, slide.height) == (900, 700)
        np.testing.assert_array_equal(slide.read_tile(333, 121, 224, 1.0), texture()[121:345, 333:557])


@pytest.mark.odd
@pytest.mark.parametrize(
    "names",
    [
        ["Brightfield_R", "Brightfield_G", "Brightfield_B"],
        ["TL Brightfield-Blue", "TL Brightfield-Green", "TL Brightfield-Red"],
        ["H&E", "H&E", "H&E"],
    ],
    ids=lambda names: names[0],
)
def test_channels_named_after_the_light_or_the_stain(tmp_path, names):
    image, order = texture(), (2, 1, 0) if names[0].endswith("Blue") else (0, 1, 2)
    write_ome(tmp_path / "a.tif", planes(image, order), axes="CYX", names=names, **PLANES)
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read_tile(333, 121, 224, 1.0), image[121:345, 333:557])


@pytest.mark.odd
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "pointer of Git LFS .*: fetch the image",
        ),
        (b"", "it is empty: give a slide that OpenSlide reads, or a TIFF"),
        (b"<!DOCTYPE html><html>404</html>", "damaged or of another kind: give a slide .* or JPEG 2000 image"),
        (b"BM" + bytes(60), "of another kind: give"),
    ],
    ids=["Git LFS", "empty", "a page of an error", "BMP"],
)
def test_what_is_no_image_is_refused_with_what_is_allowed(tmp_path, start, message):
    (tmp_path / "a.tif").write_bytes(start)
    with pytest.raises(SourceError, match=rf"image a\.tif: .*{message}"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.odd
@pytest.mark.parametrize(("unit", "mpp"), [("micrometers", 0.5), ("", None), ("pixels", None)])
def test_units_of_imagej_in_words(tmp_path, unit, mpp):
    metadata = {"unit": unit, "axes": "YXS"}
    tifffile.imwrite(tmp_path / "a.tif", texture(64, 64), imagej=True, resolution=(2, 2), metadata=metadata)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == mpp
