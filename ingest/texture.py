"""Paints the tissue of the synthetic cohort: morphology follows latent fields, colour statistics do not.

Each stain's concentration is a pointwise function of a unit-variance Gaussian field whose *spectrum* follows the
latents. A spectrum does not change a histogram, so that mean and deviation of colour carry no information about the
latents, whatever the stain. The trade-off: blobs and fibres are random fields, less like cells than drawn nuclei, but
the property holds by construction and needs no tuning.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import expit, ndtr

Image = NDArray[np.float32]

PROGRAMS = ("SIZE", "SPACING", "ALIGN")
"""The latents: size of nuclei (at equal nuclear area), spacing of fibres, how well fibres are aligned."""

_WAVELENGTHS_PX = np.geomspace(5.0, 14.0, 6)
_BANDWIDTH = 0.2  # of a texture's ring in the spectrum, in natural-log frequency
_FIBRE_SPREAD = 0.2  # of an aligned fibre texture, in radians
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])  # Ruifrok & Johnston 2001
_BACKGROUND = 243.0


@dataclass(frozen=True)
class Stain:
    """One patient's stain: optical density per unit concentration (2 x RGB) and the lamp's brightness."""

    density_23: NDArray[np.float64]
    brightness: float


def draw_stain(rng: np.random.Generator) -> Stain:
    """Returns a random stain: hue, strength and brightness differ between patients, not within one."""
    hues = np.stack([_HAEMATOXYLIN, _EOSIN]) + rng.normal(0, 0.06, (2, 3))
    strength = np.exp(rng.uniform(-0.25, 0.25, (2, 1)))
    return Stain(np.clip(hues, 0.02, None) * strength, float(rng.uniform(0.92, 1.0)))


def smooth_field(rng: np.random.Generator, size_px: int, length_px: float) -> Image:
    """Returns a smooth random field (size x size), uniform on [-1, 1], correlated over about `length_px`."""
    step = max(1, round(length_px / 4))
    cells = size_px // step + 2
    rough = gaussian_filter(rng.standard_normal((cells, cells)), length_px / step / 2, mode="wrap")
    uniform = 2 * ndtr((rough - rough.mean()) / rough.std()) - 1
    fine = zoom(uniform, size_px / cells, order=1, grid_mode=True, mode="nearest")
    return fine.astype(np.float32)


def paint(
    rng: np.random.Generator, latents: Image, density: Image, tissue: NDArray[np.bool_], stain: Stain
) -> NDArray[np.uint8]:
    """Returns an RGB image (H x W x 3) of stained tissue on a bright background.

    Args:
        rng: source of randomness.
        latents: set the texture; (len(PROGRAMS), H, W) in [-1, 1].
        density: sets the share of nuclear area, hence colour; (H, W) in [-1, 1].
        tissue: bool (H, W).
        stain: the patient's.
    """
    size, spacing, align = (latents + 1) / 2
    nuclei = expit((_textured(rng, size) - 0.9 + 0.3 * density) / 0.15)
    angle = rng.uniform(0, np.pi)
    turn = align * (np.pi / 2)
    fibre_field = np.cos(turn) * _textured(rng, spacing) + np.sin(turn) * _textured(rng, spacing, angle)
    fibres = 0.25 + 0.5 * expit(fibre_field / 0.4)
    thickness = np.exp(0.15 * smooth_field(rng, len(tissue), 48.0))
    concentration = np.stack([0.08 + 0.75 * nuclei, fibres * (1 - 0.6 * nuclei)], axis=-1) * thickness[..., None]
    optical_density = concentration @ stain.density_23 * tissue[..., None]
    light = _BACKGROUND * stain.brightness * np.exp(-optical_density) + rng.normal(0, 2.0, (*tissue.shape, 1))
    return np.clip(light, 0, 255).astype(np.uint8)


def _textured(rng: np.random.Generator, level: Image, angle: float | None = None) -> Image:
    """Returns a unit Gaussian field (H x W) whose wavelength follows `level` (H x W, in [0, 1]; 0: the finest).

    Neighbouring bands are independent, so that the weighted sum over the root of squared weights has variance 1.
    """
    band = level * (len(_WAVELENGTHS_PX) - 1)
    field, power = np.zeros_like(level), np.zeros_like(level)
    for index, wavelength in enumerate(_WAVELENGTHS_PX):
        weight = np.clip(1 - np.abs(band - index), 0, 1)
        field += weight * _band(rng, len(level), wavelength, angle)
        power += weight**2
    return (field / np.sqrt(power)).astype(np.float32)


def _band(rng: np.random.Generator, size_px: int, wavelength_px: float, angle: float | None) -> Image:
    """Returns a unit Gaussian field (size x size) of one wavelength, isotropic or of fibres across one angle."""
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None]
    radius = np.hypot(fy, fx)
    radius[0, 0] = 1e-9
    amplitude = np.exp(-0.5 * (np.log(radius * wavelength_px) / _BANDWIDTH) ** 2)
    if angle is not None:
        away = (np.arctan2(fy, fx) - angle + np.pi / 2) % np.pi - np.pi / 2
        amplitude = amplitude * np.exp(-0.5 * (away / _FIBRE_SPREAD) ** 2)
    noise = scipy.fft.rfft2(rng.standard_normal((size_px, size_px), dtype=np.float32))
    field = scipy.fft.irfft2(noise * amplitude, s=(size_px, size_px))
    return (field / field.std()).astype(np.float32)
