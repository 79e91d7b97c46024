#!/usr/bin/env python
"""Draws chosen genes over predicted slides: an overview (PNG) and squares for QuPath (GeoJSON) for each slide.

It needs no model: everything comes from the published tables. Slides that already show these genes are skipped.
"""

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run

from mclstexp.errors import PredictError

EXAMPLE = "python jobs/draw.py --predictions s3://bucket/predictions --genes ERBB2,FASN"
BLOCKS = ("storage", "cluster")


class DrawArguments(JobArguments):
    """What to draw."""

    predictions: str
    """Folder or s3:// prefix that jobs/predict.py wrote (its --out)."""
    genes: tuple[str, ...] = ()
    """Genes by symbol, gene id or Ensembl id; default the panel's first four, in overviews only."""
    slides: tuple[str, ...] = ()
    """Slides to draw; default all that are predicted."""


def main() -> None:
    """Parses, checks slides and genes, and draws."""
    arguments, config = parse(DrawArguments, __doc__ or "", EXAMPLE, BLOCKS)
    from mclstexp import cluster, storage
    from mclstexp.messages import some_of
    from mclstexp.prediction.draw import NUM_FIRST_GENES, draw_slides, require_genes, slides_to_draw
    from mclstexp.progress import bars

    out = storage.absolute(arguments.predictions)
    slides = slides_to_draw(out, arguments.slides)
    if arguments.genes:
        require_genes(out, slides, arguments.genes)
    if arguments.dry_run:
        genes = ", ".join(arguments.genes) or f"the panel's first {NUM_FIRST_GENES} genes"
        print(f"{describe(config, BLOCKS)}\nwould draw {genes} over {len(slides)} slide(s): {some_of(slides)}")
        return
    _launch.connect(config)
    cluster.require_shared(config, [f"--predictions {arguments.predictions}"], uses_tracking=False)
    with bars() as show:
        report = draw_slides(out, slides, arguments.genes, show)
    folders = [f"{out}/{name}" for name in ("overviews", "geojson")[: 2 if arguments.genes else 1]]
    print(f"{report.num_drawn} slide(s) drawn, {report.num_up_to_date} already showed these genes")
    if report.faults:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in report.faults.items())
        raise PredictError(f"{len(report.faults)} slide(s) could not be drawn, the others are in {out}:\n  {listed}")
    print(f"pictures {' and '.join(folders)}")


if __name__ == "__main__":
    run(main)
