"""Images that gzip packed, as archives publish them."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mclstexp.errors import SourceError
from mclstexp.slides.slide import is_packed, open_slide


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))


def _pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_packed_image_is_read_as_the_plain_one(image: Image.Image, tmp_path: Path, kind: str) -> None:
    plain = tmp_path / f"a.{kind}"
    image.save(plain, dpi=(25400 / 0.5, 25400 / 0.5))
    packed = _pack(plain)
    assert is_packed(packed)
    assert not is_packed(plain)
    with open_slide(plain) as expected, open_slide(packed) as found:
        assert (found.width, found.height) == (400, 300)
        assert found.mpp == expected.mpp == pytest.approx(0.5, rel=1e-3)
        for corner in ((10, 20), (300, 200), (0, 0)):
            np.testing.assert_array_equal(found.read_tile(*corner, 64, 1.0), expected.read_tile(*corner, 64, 1.0))
        np.testing.assert_array_equal(found.thumbnail(4.0), expected.thumbnail(4.0))


@pytest.mark.parametrize("kept", [30, 1000, -4])
def test_a_cut_file_is_refused(image: Image.Image, tmp_path: Path, kept: int) -> None:
    image.save(tmp_path / "a.jpg")
    packed = _pack(tmp_path / "a.jpg")
    packed.write_bytes(packed.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"image a\.jpg\.gz cannot be read, it is damaged"), open_slide(packed) as cut:
        cut.thumbnail(1.0)


def test_other_packed_files_are_refused_with_what_to_do(image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "a.tif")
    with pytest.raises(SourceError, match=r"image a\.tif\.gz: it is compressed by gzip and holds no JPEG or PNG; decompress"):
        open_slide(_pack(tmp_path / "a.tif"))
