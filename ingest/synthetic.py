"""Makes a small cohort with a known answer: gene programs follow tissue morphology and nothing else.

A patient's colour (stain) and a spot's depth (library size, which follows the visible density of nuclei) vary strongly
but carry no information about composition, so that a model has to read texture. Files have the formats of real sections
(legacy ST tables, pyramidal TIFF slides); the trade-off is realism of the biology: three smooth programs.
"""

import csv
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray

from ingest.texture import PROGRAMS, Image, Stain, draw_stain, paint, smooth_field

MPP = 1.0
"""Micrometres per pixel of every slide."""
_COLUMNS = (
    *("section_id", "patient_id", "format", "image", "expression", "positions"),
    *("mpp", "spot_diameter_um", "labels", "site", "pitch_um"),
)
_NOISE_SHARE = 0.125  # of the genes follow no program
_DISPERSION = 0.04  # variance of a gene's rate over its squared mean
_TIFF_TILE_PX = 256


@dataclass(frozen=True)
class CohortSpec:
    """Size and content of a cohort; equal specs give equal bytes."""

    num_patients: int = 6
    """Patients with measured sections; one more patient has an H&E-only slide."""
    sections_per_patient: int = 2
    array_side: int = 12
    """Spots along each edge of the array."""
    pitch_px: int = 64
    """Distance of neighbouring spots in pixels; tiles up to this edge do not overlap."""
    patch_pitches: float = 2.0
    """Distance over which the programs change, in pitches: smaller patches give more independent spots."""
    num_genes: int = 160
    median_counts: int = 8000
    """Median library size of a spot."""
    seed: int = 0

    @classmethod
    def tiny(cls) -> Self:
        """Returns a cohort for fixtures: made in about a second, too small to learn from."""
        return cls(num_patients=3, array_side=6, pitch_px=32, num_genes=40, median_counts=1500)

    @classmethod
    def small(cls) -> Self:
        """Returns a cohort with 32 px tiles that a small network learns in seconds, clearly better than chance."""
        return cls(num_patients=8, pitch_px=32, patch_pitches=1.0, num_genes=80, median_counts=2500)

    @classmethod
    def demo(cls) -> Self:
        """Returns the cohort of `make demo`: 64 px tiles for DenseNet-121."""
        return cls()

    @property
    def size_px(self) -> int:
        """Edge of a slide: the array and one and a half pitches of background on each side."""
        return (self.array_side + 3) * self.pitch_px


@dataclass(frozen=True)
class _Genes:
    """Response of genes to the programs: log rate = log_base + effect @ latents."""

    name: tuple[str, ...]
    log_base_G: NDArray[np.float64]
    effect_GP: NDArray[np.float64]


def make_cohort(out_dir: str | Path, spec: CohortSpec) -> str:
    """Writes the cohort under `out_dir` (a local folder) and returns the path of its sample sheet.

    Each measured section has a slide (tiled, pyramidal TIFF), a counts table (spots x genes, index `{x}x{y}`), a
    spot-selection table and each spot's strongest program as its label. One more patient has a slide without
    expression.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    genes = _draw_genes(spec)
    rows = [
        _write_section(out, spec, genes, patient, section)
        for patient in range(spec.num_patients)
        for section in range(spec.sections_per_patient)
    ]
    rows.append(_write_slide_only(out, spec))
    sheet = out / "samples.csv"
    with open(sheet, "w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(sheet)


def _rng(spec: CohortSpec, *names: str) -> np.random.Generator:
    """Returns a generator that depends only on seed and names, so that a new patient does not change the others."""
    return np.random.default_rng([spec.seed, *(zlib.crc32(name.encode()) for name in names)])


def _draw_genes(spec: CohortSpec) -> _Genes:
    """Returns genes of one program (some of two), cycling through the programs, then the noise genes."""
    rng = _rng(spec, "genes")
    num_signal = round(spec.num_genes * (1 - _NOISE_SHARE))
    effect = np.zeros((spec.num_genes, len(PROGRAMS)))
    program = np.arange(num_signal) % len(PROGRAMS)
    effect[np.arange(num_signal), program] = rng.choice([-1, 1], num_signal) * rng.uniform(0.7, 1.3, num_signal)
    second = np.flatnonzero(rng.random(num_signal) < 0.25)
    effect[second, (program[second] + 1) % len(PROGRAMS)] = rng.choice([-0.5, 0.5], len(second))
    names = [f"{PROGRAMS[kind]}{index:03d}" for index, kind in enumerate(program)]
    names += [f"NOISE{index:03d}" for index in range(num_signal, spec.num_genes)]
    return _Genes(tuple(names), rng.normal(0, 0.5, spec.num_genes), effect)


def _write_section(out: Path, spec: CohortSpec, genes: _Genes, patient: int, section: int) -> dict[str, str]:
    patient_id, section_id = f"P{patient + 1}", f"P{patient + 1}S{section + 1}"
    rng = _rng(spec, "section", section_id)
    latents, density = _write_slide(out / f"{section_id}.tif", rng, spec, patient_id)
    spots = _array(spec)
    at_spots = (slice(None), spots.pixel_y.to_numpy(), spots.pixel_x.to_numpy())
    depth = np.exp(_rng(spec, "depth", patient_id).normal(0, 0.3) + 0.4 * density[at_spots[1:]])
    depth *= np.where(spots.selected, 1.0, 0.05) * rng.lognormal(0, 0.4, len(spots))
    counts = _draw_counts(rng, genes, latents[at_spots].T, spec.median_counts * depth)
    _write_tsv(out / f"{section_id}_selection.tsv", spots, index=False)
    index = [f"{x}x{y}" for x, y in zip(spots.x, spots.y, strict=True)]
    _write_tsv(out / f"{section_id}.tsv.gz", pd.DataFrame(counts, index, genes.name), index=True)
    strongest = np.array(PROGRAMS)[latents[at_spots].argmax(axis=0)]
    _write_tsv(out / f"{section_id}_labels.tsv", pd.DataFrame({"spot_id": index, "label": strongest}), index=False)
    return {
        **_row(section_id, patient_id, "legacy_st"),
        "expression": f"{section_id}.tsv.gz",
        "positions": f"{section_id}_selection.tsv",
        "labels": f"{section_id}_labels.tsv",
        "spot_diameter_um": str(round(spec.pitch_px * MPP * 0.5)),
        "pitch_um": f"{spec.pitch_px * MPP:g}",
    }


def _write_slide_only(out: Path, spec: CohortSpec) -> dict[str, str]:
    patient_id = f"P{spec.num_patients + 1}"
    section_id = f"{patient_id}S1"
    _write_slide(out / f"{section_id}.tif", _rng(spec, "section", section_id), spec, patient_id)
    return _row(section_id, patient_id, "slide")


def _row(section_id: str, patient_id: str, kind: str) -> dict[str, str]:
    return {
        "section_id": section_id,
        "patient_id": patient_id,
        "format": kind,
        "image": f"{section_id}.tif",
        "mpp": str(MPP),
        "site": "synthetic",
    }


def _write_slide(path: Path, rng: np.random.Generator, spec: CohortSpec, patient_id: str) -> tuple[Image, Image]:
    """Paints and writes one slide; returns its latents (programs x H x W) and its density of nuclei (H x W)."""
    stain: Stain = draw_stain(_rng(spec, "stain", patient_id))
    latents = np.stack([smooth_field(rng, spec.size_px, spec.patch_pitches * spec.pitch_px) for _ in PROGRAMS])
    density = smooth_field(rng, spec.size_px, 1.0 * spec.pitch_px)
    write_pyramid(path, paint(rng, latents, density, _tissue(rng, spec), stain))
    return latents, density


def _tissue(rng: np.random.Generator, spec: CohortSpec) -> NDArray[np.bool_]:
    """Returns the tissue: a rounded square with a wavy border, which covers all but the array's corners."""
    axis = (np.arange(spec.size_px) + 0.5 - spec.size_px / 2) / (spec.array_side * spec.pitch_px / 2)
    y, x = axis[:, None], axis[None]
    wave = 0.03 * np.sin(5 * np.arctan2(y, x) + rng.uniform(0, 2 * np.pi))
    return (x**4 + y**4) ** 0.25 < 1.05 + wave


def _array(spec: CohortSpec) -> pd.DataFrame:
    """Returns the selection table: array x, y and their measured values, pixel centre, and whether tissue covers it."""
    index = np.arange(spec.array_side)
    y, x = (axis.ravel() for axis in np.meshgrid(index, index, indexing="ij"))
    pixel_x, pixel_y = (((axis + 2.0) * spec.pitch_px).astype(int) for axis in (x, y))
    offset_x, offset_y = ((2 * axis + 1) / spec.array_side - 1 for axis in (x, y))
    return pd.DataFrame(
        {
            "x": x,
            "y": y,
            "new_x": x.astype(float),
            "new_y": y.astype(float),
            "pixel_x": pixel_x,
            "pixel_y": pixel_y,
            "selected": ((offset_x**4 + offset_y**4) ** 0.25 < 1).astype(int),
        }
    )


def _draw_counts(
    rng: np.random.Generator, genes: _Genes, latents_NP: NDArray[np.floating], depth_N: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Returns negative binomial counts (spots x genes): gamma rates that sum to about the depth, then Poisson."""
    rate = np.exp(genes.log_base_G + latents_NP @ genes.effect_GP.T)
    rate *= (depth_N / rate.sum(axis=1))[:, None]
    return rng.poisson(rng.gamma(1 / _DISPERSION, rate * _DISPERSION))


def _write_tsv(path: Path, table: pd.DataFrame, index: bool) -> None:
    data = table.to_csv(sep="\t", index=index, lineterminator="\n").encode()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def write_pyramid(path: Path, image: NDArray[np.uint8], mpp: float | None = MPP) -> None:
    """Writes an image (H x W x 3) as a tiled JPEG TIFF whose levels halve down to one tile.

    Its resolution, `mpp` micrometres per pixel, is written in pixels per centimetre; None: no resolution is written.
    """
    with tifffile.TiffWriter(path) as tiff:
        for level in range(_num_levels(len(image))):
            resolution = None if mpp is None else (1e4 / (mpp * 2**level),) * 2
            tiff.write(
                _halved(image, level),
                tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 95},
                subsampling=(1, 1),  # halved colour would blur only fine textures, and its deviation would reveal them
                resolution=resolution,
                resolutionunit=None if resolution is None else "CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
                software=False,
            )


def _num_levels(size_px: int) -> int:
    return 1 + max(1, int(np.ceil(np.log2(size_px / _TIFF_TILE_PX))))


def _halved(image: NDArray[np.uint8], times: int) -> NDArray[np.uint8]:
    for _ in range(times):
        height, width = (edge // 2 * 2 for edge in image.shape[:2])
        blocks = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
        image = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return image
