"""The H&E rule: silent on H&E, real and drawn; fluorescence, IHC, grey and inverted images are flagged with numbers."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ingest.texture import draw_stain, paint, smooth_field
from mclstexp.slides.slide import open_slide
from mclstexp.slides.stain import not_h_and_e, stain_figures
from mclstexp.slides.tissue import find_tissue_on_thumbnail, tissue_mask

SIZE = 256
HAEMATOXYLIN, DAB = np.array([0.65, 0.70, 0.29]), np.array([0.27, 0.57, 0.78])  # Ruifrok & Johnston 2001


def tissue_disk():
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.hypot(y - SIZE / 2, x - SIZE / 2) < 0.4 * SIZE


def h_and_e(seed):
    rng = np.random.default_rng(seed)
    latents = np.stack([smooth_field(rng, SIZE, 60.0) for _ in range(3)])
    return paint(rng, latents, smooth_field(rng, SIZE, 60.0), tissue_disk(), draw_stain(rng))


def cells(seed):
    """Blobs in [0, 1] within the tissue."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((SIZE, SIZE)), 2)
    return np.clip(noise / noise.std() / 2 + 0.3, 0, 1) * tissue_disk()


def noisy(image, seed=0, sigma=2.0):
    return np.clip(image + np.random.default_rng(seed).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def fluorescence(*colours):
    """Each channel's cells shine in its colour on black."""
    light = sum(cells(seed)[..., None] * np.array(colour) * 200 for seed, colour in enumerate(colours))
    return noisy(light + 8.0)


def immunohistochemistry(positive):
    """A blue counterstain, and DAB in `positive` of the tissue."""
    rng = np.random.default_rng(3)
    brown = (gaussian_filter(rng.standard_normal((SIZE, SIZE)), 6) * 1e3).argsort(
        axis=None
    ).argsort() < positive * SIZE**2
    brown = brown.reshape(SIZE, SIZE)[..., None]
    density = np.where(brown, DAB, 0.5 * HAEMATOXYLIN) * (0.3 + cells(1)[..., None]) * tissue_disk()[..., None]
    return noisy(243 * np.exp(-density))


def verdict(image):
    return not_h_and_e(image, tissue_mask(image, 8.0))


@pytest.mark.parametrize("seed", range(8))
def test_drawn_h_and_e_passes(seed):
    assert verdict(h_and_e(seed)) == ""


def test_h_and_e_cut_out_onto_black_passes():
    image = h_and_e(0)
    image[~tissue_disk()] = 0
    assert verdict(image) == ""


def test_an_empty_slide_passes():
    assert verdict(noisy(np.full((SIZE, SIZE, 3), 240.0))) == ""
    assert verdict(np.full((SIZE, SIZE, 3), 255, np.uint8)) == ""


@pytest.mark.parametrize(
    "colours",
    [
        [(0.05, 0.1, 1.0)],
        [(0.1, 1.0, 0.1)],
        [(1.0, 0.05, 0.9)],  # as pink as eosin
        [(0.05, 0.1, 1.0), (0.1, 1.0, 0.1)],
        [(0.05, 0.1, 1.0), (1.0, 0.1, 0.1)],
        [(0.05, 0.1, 1.0), (0.1, 1.0, 0.1), (1.0, 0.1, 0.1)],
    ],
)
def test_fluorescence_is_flagged(colours):
    assert "fluorescence" in verdict(fluorescence(*colours)) or "another stain" in verdict(fluorescence(*colours))


def test_light_on_black_is_named():
    assert "% of its image is dim" in verdict(fluorescence((0.05, 0.1, 1.0)))


@pytest.mark.parametrize("positive", [0.4, 0.7, 1.0])
def test_brown_is_flagged(positive):
    assert "% brown" in verdict(immunohistochemistry(positive))


def test_a_weak_antibody_passes_as_the_rule_says():
    assert verdict(immunohistochemistry(0.02)) == ""


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_grey_is_flagged(sigma):
    grey = np.repeat(h_and_e(1).mean(axis=2, keepdims=True), 3, axis=2)
    assert "it looks grey" in verdict(noisy(grey, sigma=sigma))


@pytest.mark.parametrize("seed", range(4))
def test_inverted_is_flagged(seed):
    assert verdict(255 - h_and_e(seed)) != ""


def test_shares_are_counted_as_stated():
    """Ten pixels of known colour: 6 pink, 2 brown, 1 green, 1 grey; two of twelve are dim."""
    pink, brown, green, grey, black = (230, 120, 180), (160, 110, 60), (80, 200, 90), (150, 150, 150), (5, 5, 5)
    image = np.array([[pink] * 6 + [brown] * 2 + [green, grey] + [black] * 2], np.uint8)
    found = stain_figures(image, np.ones((1, 12), bool))
    assert found.dim == pytest.approx(2 / 12)
    assert found.coloured == pytest.approx(9 / 10)
    assert found.brown == pytest.approx(2 / 9)
    assert found.h_and_e == pytest.approx(6 / 9)


@pytest.mark.skipif("MCLSTEXP_DATA" not in os.environ, reason="MCLSTEXP_DATA names no folder of real data")
@pytest.mark.slow
def test_no_false_alarm_on_real_images():
    """None of the 10 real images is flagged (3 slides, 7 sections as JPEG or PNG); 4 of them, the fast ones, are here.

    `benchmarks/stain_rule.py` measures all 10. The closest to a limit: 90 % coloured (limit 50 %), 99 % pink to
    blue-violet (limit 70 %), none brown (limit 20 %), a saturation of 0.40 (limit 0.6, and only on black).
    """
    root = Path(os.environ["MCLSTEXP_DATA"])
    images = {
        "slides/cmu_small_region.svs": 0.499,
        "slides/tcga-cr-7395-01a-01-ts1.svs": 0.5,
        "her2st/images/A1_lowres.png": 3.4,
        "mob/MOB1.jpg": 3.0,
    }
    for name, mpp in images.items():
        with open_slide(root / name) as slide:
            mask, thumbnail = find_tissue_on_thumbnail(slide, mpp)
        assert not_h_and_e(thumbnail, mask.is_tissue) == "", name
        assert not_h_and_e(255 - thumbnail, tissue_mask(255 - thumbnail, 8.0)) != "", name
