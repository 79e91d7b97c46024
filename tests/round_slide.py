"""A slide with a disk of tissue in it, and a plan that cuts it into small tiles."""

from dataclasses import replace

import numpy as np

from ingest.texture import draw_stain, paint, smooth_field
from mclstexp.prediction.plan import CohortPlan
from mclstexp.settings import TilesConfig

SIZE, MPP, TILE = 512, 2.0, 16


def tissue_image(seed=0):
    """Returns the slide's pixels, uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    tissue = np.hypot(y - SIZE / 2, x - SIZE / 2) < 0.4 * SIZE
    latents = np.stack([smooth_field(rng, SIZE, 60.0) for _ in range(3)])
    return paint(rng, latents, smooth_field(rng, SIZE, 60.0), tissue, draw_stain(rng))


def make_plan(folder, **changes):
    """Returns a plan with output and scratch below a folder."""
    plan = CohortPlan(
        out=str(folder / "out"),
        tiles=TilesConfig(size_px=TILE, min_tissue=0.5),
        mpp=MPP,
        model_digest="model",
        scratch=str(folder / "scratch"),
        scratch_budget_bytes=2**30,
    )
    return replace(plan, **changes)
