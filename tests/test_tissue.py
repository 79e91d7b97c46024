"""The tissue mask: what is tissue, what is not, and each tile's share of it."""

import numpy as np
import pytest
from PIL import Image

from mclstexp.slides.slide import open_slide
from mclstexp.slides.tissue import TissueMask, find_tissue, otsu, tissue_mask

PAPER, PINK, PURPLE, GREY, BLACK = (243, 241, 244), (226, 152, 194), (120, 84, 160), (150, 150, 152), (5, 5, 5)


def scene(*patches, size=200, seed=0):
    """A background with coloured rectangles ((y0, y1, x0, x1), colour) and camera noise."""
    image = np.empty((size, size, 3))
    image[:] = PAPER
    for (y0, y1, x0, x1), colour in patches:
        image[y0:y1, x0:x1] = colour
    return (image + np.random.default_rng(seed).normal(0, 2, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [PINK, PURPLE])
def test_stained_tissue_is_found(colour):
    mask = tissue_mask(scene(((50, 150, 40, 120), colour)), 8.0)
    expected = np.zeros((200, 200), bool)
    expected[50:150, 40:120] = True
    assert (mask & expected).sum() / (mask | expected).sum() > 0.93


def test_both_stains_together_are_tissue():
    mask = tissue_mask(scene(((50, 100, 40, 120), PINK), ((100, 150, 40, 120), PURPLE)), 8.0)
    assert mask[55:145, 45:115].mean() > 0.99


@pytest.mark.parametrize("colour", [PAPER, GREY, BLACK, (252, 253, 255)])
def test_unstained_areas_are_not_tissue(colour):
    assert tissue_mask(scene(((50, 150, 40, 120), colour)), 8.0).mean() < 0.01


@pytest.mark.parametrize("value", [0, 128, 255])
def test_blank_slides_are_empty(value):
    assert not tissue_mask(np.full((100, 100, 3), value, np.uint8), 8.0).any()


def test_small_gaps_are_tissue_and_large_ones_are_not():
    tissue = ((20, 180, 20, 180), PINK)
    small, large = ((60, 70, 60, 70), PAPER), ((80, 170, 80, 170), PAPER)
    mask = tissue_mask(scene(tissue, small, large), 8.0)
    assert mask[60:70, 60:70].all()
    assert mask[110:140, 110:140].mean() < 0.01


def test_dust_is_not_tissue():
    mask = tissue_mask(scene(((20, 28, 20, 28), PURPLE), ((100, 180, 100, 180), PURPLE)), 8.0)
    assert not mask[10:40, 10:40].any()
    assert mask[110:170, 110:170].all()


def test_background_of_a_small_slide_is_not_a_hole():
    mask = tissue_mask(scene(((10, 26, 10, 26), PINK), size=36), 8.0)
    assert mask[14:22, 14:22].all()
    assert not mask[:5].any()


def test_otsu_splits_two_heaps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 0.5, 3000), rng.normal(10, 0.5, 1000)])
    assert (values > otsu(values)).sum() == 1000
    assert otsu(np.ones(10)) >= 1


def test_otsu_is_the_best_split_of_brute_force():
    values = np.random.default_rng(1).gamma(2, 1, 2000)
    histogram, edges = np.histogram(values, 64)
    centres = (edges[1:] + edges[:-1]) / 2
    data = np.repeat(centres, histogram)

    def within(threshold):
        low, high = data[data <= threshold], data[data > threshold]
        return len(low) * low.var() + len(high) * high.var()

    best = min(edges[1:-1], key=within)
    assert otsu(values, 64) == pytest.approx(best)


def test_share_of_tiles_equals_brute_force():
    rng = np.random.default_rng(0)
    mask = TissueMask(rng.random((50, 60)) < 0.3, scale=4.0)
    left, top = rng.integers(0, 45, 20) * 4.0, rng.integers(0, 35, 20) * 4.0
    blown_up = mask.is_tissue.repeat(4, axis=0).repeat(4, axis=1)
    expected = [blown_up[int(t) : int(t) + 40, int(l) : int(l) + 40].mean() for l, t in zip(left, top, strict=True)]  # noqa: E741
    np.testing.assert_allclose(mask.share(left, top, 40.0), expected, rtol=1e-6)


def test_mask_of_a_slide_has_its_scale(tmp_path):
    image = scene(((300, 700, 200, 800), PINK), size=1000)
    Image.fromarray(image).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        mask = find_tissue(slide, 2.0)
    assert mask.scale == 4.0
    assert mask.share(np.array([400.0, 0.0]), np.array([400.0, 0.0]), 100.0).tolist() == [1.0, 0.0]
