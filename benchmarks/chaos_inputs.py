"""What `chaos.py` predicts: slides of all sizes and faults, and an untrained model version with a random bank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from untrained_model import save_untrained

from ingest.synthetic import MPP, CohortSpec, make_cohort, write_pyramid

TILE_PX, NUM_GENES, NUM_SPOTS = 64, 24, 300
HUGE, MEDIUM, TINY = (64, 65), (18, 27), (3, 9)
"""Bounds of a slide's edge in tiles: 4,096 tiles; 324 to 676; 9 to 64."""
BACKGROUND = 220
"""Least value of a channel where there is no tissue."""
SETTINGS = {
    "tiles.size_px": TILE_PX,
    "tiles.mpp": MPP,
    "model.image_encoder": "small_cnn",
    "retrieval.k": 20,
    "retrieval.effective_donors": 10.0,
    "train.precision": "fp32",
}


@dataclass(frozen=True)
class Expected:
    """What must become of a slide."""

    state: str
    reason: str = ""
    """Words of the ledger's reason."""


def make_slides(folder: Path, num_slides: int, seed: int) -> dict[str, Expected]:
    """Writes slides as pyramidal TIFF files and returns what must become of each.

    Of 50, two have 4,096 tiles, ten several parts; three files are truncated, three blank, one says no resolution.
    """
    rng = np.random.default_rng(seed)
    spec = CohortSpec(num_patients=1, sections_per_patient=1, pitch_px=32, num_genes=8, seed=seed)
    texture = tifffile.imread(Path(make_cohort(folder / "texture", spec)).with_name("P1S1.tif"), key=0)
    slides = folder / "slides"
    slides.mkdir()
    expected = {}
    for number, (kind, bounds) in enumerate(_kinds(num_slides)):
        name = f"{kind}{number:03d}"
        expected[name] = _write(slides / f"{name}.tif", kind, int(rng.integers(*bounds)) * TILE_PX, texture, rng)
    return expected


def make_model(folder: Path, seed: int) -> None:
    """Saves an untrained model version for such slides into a new folder."""
    save_untrained(folder, SETTINGS, NUM_GENES, NUM_SPOTS, seed)


def _kinds(num_slides: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields each slide's kind and the bounds of its edge in tiles."""
    counts = {"cut": max(1, num_slides // 16), "blank": max(1, num_slides // 16), "no_mpp": 1}
    counts |= {"huge": max(1, num_slides // 25), "medium": num_slides // 5}
    bounds = {"cut": MEDIUM, "huge": HUGE, "medium": MEDIUM}
    for kind, count in counts.items():
        yield from [(kind, bounds.get(kind, TINY))] * count
    yield from [("tiny", TINY)] * (num_slides - sum(counts.values()))


def _write(path: Path, kind: str, edge_px: int, texture: np.ndarray, rng: np.random.Generator) -> Expected:
    """Writes a slide of one kind, and returns what must become of it."""
    blank = kind == "blank"
    image = np.full((edge_px, edge_px, 3), 243, np.uint8) if blank else _tissue(texture, edge_px, rng)
    write_pyramid(path, image, None if kind == "no_mpp" else MPP)
    if blank:
        return Expected("empty")
    if kind == "no_mpp":
        return Expected("quarantined", "no resolution")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return Expected("quarantined", path.name)
    return Expected("done")


def _tissue(texture: np.ndarray, edge_px: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the texture from a random offset on, repeated, and a little brighter towards a corner: no tile repeats.

    The offset is drawn again until at least half of the image is tissue.
    """
    times = -(-edge_px // len(texture))
    while True:
        rolled = np.roll(texture, rng.integers(0, len(texture), 2), (0, 1))
        image = np.tile(rolled, (times, times, 1))[:edge_px, :edge_px]
        if (image.min(axis=2) < BACKGROUND).mean() > 1 / 2:
            break
    ramp = np.linspace(0.94, 1.0, edge_px)
    return (image * (ramp[:, None] * ramp)[..., None]).astype(np.uint8)
