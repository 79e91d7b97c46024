"""Stored tiles survive their encoding, and damaged ones are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from mclstexp.errors import TableError
from mclstexp.slides.codec import MAX_TILE_PX, decode_tile, encode_tile


@pytest.fixture
def tile():
    y, x = np.mgrid[:96, :96]
    waves = [128 + 90 * np.sin(x / (9 + c)) * np.cos(y / (7 + c)) for c in range(3)]
    return np.stack(waves, axis=2).astype(np.uint8)


def test_png_is_exact(tile):
    np.testing.assert_array_equal(decode_tile(encode_tile(tile, "png", 90)), tile)


@pytest.mark.parametrize(("quality", "error"), [(98, 1.0), (90, 3.0), (60, 6.0)])
def test_jpeg_is_close_and_in_rgb_order(tile, quality, error):
    found = decode_tile(encode_tile(tile, "jpeg", quality))
    assert found.shape == tile.shape
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - tile).mean() < error
    pillow = np.asarray(Image.open(io.BytesIO(encode_tile(tile, "jpeg", quality))))
    assert np.abs(found.astype(int) - pillow).max() <= 4


def test_noncontiguous_tiles_are_encoded_as_they_look(tile):
    np.testing.assert_array_equal(decode_tile(encode_tile(tile[::2, 10:50], "png", 90)), tile[::2, 10:50])


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.1, 0.0])
def test_truncated_tiles_are_refused(tile, encoding, share):
    data = encode_tile(tile, encoding, 90)
    with pytest.raises(TableError, match="cannot be decoded"):
        decode_tile(data[: int(len(data) * share)])


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_a_tile_is_decoded_into_its_place(tile, encoding):
    data, height = encode_tile(tile, encoding, 90), len(tile)
    batch = np.zeros((3, *tile.shape), np.uint8)
    decode_tile(data, batch[1])
    assert np.array_equal(batch[1], decode_tile(data))
    assert not batch[[0, 2]].any()
    with pytest.raises(TableError, match=f" x {height} px instead of "):
        decode_tile(data, np.zeros((height + 1, *tile.shape[1:]), np.uint8))
    with pytest.raises(TableError, match="cannot be decoded"):
        decode_tile(data[: len(data) // 2], batch[1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_png_modes_are_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, "PNG")
    with pytest.raises(TableError, match=f"mode {mode}"):
        decode_tile(buffer.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_giant_tiles_are_refused_before_they_are_decoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (MAX_TILE_PX + 1, 8)).save(buffer, kind)
    with pytest.raises(TableError, match=f"{MAX_TILE_PX + 1} x 8 px"):
        decode_tile(buffer.getvalue())


def test_other_formats_are_not_tried(tile):
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "GIF")
    with pytest.raises(TableError):
        decode_tile(buffer.getvalue())
