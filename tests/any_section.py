"""Random sections whose image and counts name each of their spots, as they are in truth; no code of the product.

A spot's patch of the image has a colour of its own, and its count of the first gene is its number plus one.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree

PATCH_PX = 17  # edge of a spot's patch
MARGIN_PX = 48  # tissue and glass around the outer spots
GLASS, TISSUE = (245, 245, 245), (190, 90, 160)
GENES = [(f"ENSG{i:011d}", f"GENE{i}") for i in range(1, 13)]
FLY_GENES = [(f"FBgn{i:07d}", symbol) for i, (_, symbol) in enumerate(GENES, 1)]
OTHERS = [
    ("CD3E_TotalSeqB", "Antibody Capture"),
    ("NegControlProbe_00042", "Negative Control Probe"),
    ("BLANK_0006", "Unassigned Codeword"),
]
"""Name and kind of features that are not genes."""
KEPT, NOT_SELECTED, NO_COUNTS, NO_POSITION = "kept", "not_selected", "no_counts", "no_position"
CROSSES_EDGE = "crosses_edge"


@dataclass(frozen=True)
class AnySection:
    """A section of n spots; everything in the same order of spots and genes."""

    hexagonal: bool
    """Visium's array, 100 um from spot to spot; else a square one."""
    pitch_um: float
    mpp: float
    row: np.ndarray
    """Position on the array, int (n,)."""
    col: np.ndarray
    x: np.ndarray
    """Position on the image in pixels, float (n,)."""
    y: np.ndarray
    genes: tuple[tuple[str, str], ...]
    """Stable id and symbol of the measured genes."""
    counts: np.ndarray
    """int (n, genes)."""
    other_counts: np.ndarray
    """Of `OTHERS`, int (n, 3)."""
    fate: np.ndarray
    """What becomes of each spot, apart from the image's edge, str (n,)."""
    pixels: np.ndarray
    """The image, uint8 (height, width, 3)."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def barcodes(self) -> list[str]:
        """A name for each spot."""
        return [f"AAAC{row:03d}{col:03d}GT-1" for row, col in zip(self.row, self.col, strict=True)]

    @property
    def spot_um(self) -> float:
        """Diameter of a spot."""
        return 55.0 if self.hexagonal else 100.0

    def outcome(self, tile_px: float) -> list[str]:
        """Returns what becomes of each spot if a tile covers so many pixels of the image."""
        height, width = self.pixels.shape[:2]
        x, y, half = np.floor(self.x), np.floor(self.y), tile_px / 2
        whole = (x - half >= 0) & (y - half >= 0) & (x + half <= width) & (y + half <= height)
        return [
            CROSSES_EDGE if fate == KEPT and not is_whole else fate
            for fate, is_whole in zip(self.fate, whole, strict=True)
        ]

    def spot_of(self, colour: np.ndarray) -> int:
        """Returns the spot whose patch is nearest to a colour; -1 if none is near."""
        distance = np.abs(colours(len(self)) - colour.astype(int)).max(axis=1)
        return int(distance.argmin()) if distance.min() <= 2 else -1

    def with_(self, **changes: np.ndarray) -> "AnySection":
        """Returns the section with other values."""
        return replace(self, **changes)


def colours(num_spots: int) -> np.ndarray:
    """Returns colours like stained tissue, at least 6 apart, int (n, 3)."""
    i = np.arange(num_spots)
    return np.stack([150 + i // 12 * 8, 60 + i % 12 * 6, np.full(num_spots, 150)], axis=1)


def any_section(
    seed: int,
    hexagonal: bool = True,
    pitch_um: float = 100.0,
    mpp: float = 1.0,
    angle: float = 0.0,
    shear: float = 0.0,
    genes: tuple[tuple[str, str], ...] = tuple(GENES),
    edge_px: int = MARGIN_PX,
    glass: float = 0.3,
) -> AnySection:
    """Returns a section with random holes in its array, random counts, and some spots of every fate.

    Args:
        seed: of all that is random.
        hexagonal: Visium's array, else a square one.
        pitch_um: from spot to spot.
        mpp: of the image.
        angle: by which the array is turned on the image, in degrees.
        shear: of the array on the image.
        genes: stable id and symbol of the measured ones.
        edge_px: pixels between the image's left edge and its first spot.
        glass: to the right and below, in widths and heights of the array; too little, and no tissue is told from it.
    """
    rng = np.random.default_rng(seed)
    row, col = _array(rng, hexagonal, pitch_um / mpp)
    um = np.stack([col * 0.5, row * math.sqrt(3) / 2] if hexagonal else [col, row], axis=1) * pitch_um
    turn = math.radians(angle)
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    xy = um @ (turned @ [[1, shear], [0, 1]] / mpp).T
    xy = np.round(xy - xy.min(axis=0) + [edge_px, MARGIN_PX], 2)
    counts = rng.poisson(2.0, (len(row), len(genes)))
    counts[:, 0] = np.arange(len(row)) + 1
    fate = rng.choice([KEPT, NOT_SELECTED, NO_COUNTS, NO_POSITION], len(row), p=[0.76, 0.08, 0.08, 0.08])
    counts[fate == NO_COUNTS] = 0
    return AnySection(
        hexagonal=hexagonal,
        pitch_um=pitch_um,
        mpp=mpp,
        row=row,
        col=col,
        x=xy[:, 0],
        y=xy[:, 1],
        genes=tuple(genes),
        counts=counts,
        other_counts=rng.poisson(300, (len(row), len(OTHERS))) + 1,
        fate=fate,
        pixels=_image(xy, pitch_um / mpp, glass),
    )


def _array(rng: np.random.Generator, hexagonal: bool, pitch_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of a piece of the array with holes; a small one where spots are far apart."""
    num_rows, num_cols = (5, 6) if pitch_px > 150 else rng.integers(6, 9, 2)
    row, step = (axis.ravel() for axis in np.indices((num_rows, num_cols)))
    row, step = row + rng.integers(1, 9), step + rng.integers(1, 9)
    kept = rng.permutation(len(row))[: int(0.9 * len(row))]
    row, step = row[kept], step[kept]
    return row, (2 * step + row % 2 if hexagonal else step)


def _image(xy: np.ndarray, pitch_px: float, glass: float) -> np.ndarray:
    """Returns glass, tissue around all spots, and a patch for each."""
    extent = np.ptp(xy, axis=0)
    needed = np.ceil(xy.max(axis=0) + MARGIN_PX + glass * extent).astype(int)
    width, height = (needed + -needed % 4).tolist()  # levels of a pyramid are exact halves
    image = Image.new("RGB", (width, height), GLASS)
    draw = ImageDraw.Draw(image)
    neighbour = float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
    radius = max(neighbour, pitch_px) * 0.8
    for x, y in xy.tolist():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=TISSUE)
    half = PATCH_PX // 2
    for (x, y), colour in zip(np.floor(xy).astype(int).tolist(), colours(len(xy)).tolist(), strict=True):
        draw.rectangle((x - half, y - half, x + half, y + half), fill=tuple(colour))
    return np.asarray(image)
