#!/usr/bin/env python
"""Computes a frozen encoder's features of every tile of a table, once; run it again and only what changed is redone."""

from typing import TYPE_CHECKING

import _launch  # first: puts the project on the path
from _cli import JobArguments, describe, parse, run
from _encoder import warn_of_encoder
from pydantic import Field

if TYPE_CHECKING:
    from mclstexp.model.extract import Renewal

EXAMPLE = (
    "python jobs/embed.py --data s3://bucket/tiles --model.image_encoder uni2-h --model.image_layers class_mean "
    "--model.image_weights uni2-h.bin"
)
BLOCKS = ("storage", "cluster", "model", "train")


class EmbedArguments(JobArguments):
    """Whose tiles to encode. Features are stored beside them, for every view that the table has."""

    data: str
    """Tile table: a folder or s3:// URI."""
    sections: tuple[str, ...] = ()
    """Sections to encode; default all."""
    views: int | None = Field(None, ge=0, le=64)
    """Augmented draws of each tile that are encoded too; default train.feature_draws."""


def main() -> None:
    """Parses, reads the encoder's weights, brings the features up to date."""
    arguments, config = parse(EmbedArguments, __doc__ or "", EXAMPLE, BLOCKS, implied={"model.freeze_encoder": True})
    from mclstexp import cluster, progress
    from mclstexp.config import override
    from mclstexp.data.features import FEATURES
    from mclstexp.data.schema import load_manifest
    from mclstexp.model.extract import plan_features, renew_features, wanted
    from mclstexp.model.frozen import frozen_encoder
    from mclstexp.training.run import with_views

    # Mistakes first
    if arguments.views is not None:
        config = override(config, {"train.feature_draws": arguments.views}, "--views")
    manifest = load_manifest(arguments.data)
    names = tuple(dict.fromkeys(arguments.sections)) or tuple(entry.section_id for entry in manifest.sections)
    manifest.num_spots(names)  # refuses unknown ones
    warn_of_encoder(config.model, manifest)
    config = with_views(config, manifest)
    encoder = frozen_encoder(config.model, manifest.tile_size_px, config.train.seed)
    if arguments.dry_run:
        from mclstexp.model.forecast import forecast

        plain, missing = plan_features(arguments.data, manifest, names, encoder, wanted(config))
        print(describe(config, BLOCKS))
        print(f"would write {FEATURES}/{plain.name}: {forecast(arguments.data, manifest, missing, encoder, plain)}")
        return

    _launch.connect(config)
    cluster.require_shared(config, [f"--data {arguments.data}"], uses_tracking=False)
    with progress.bars() as show:
        renewal = renew_features(arguments.data, manifest, names, encoder, wanted(config), show)
    _tell(renewal, len(names))
    print(f"features {renewal.root}")


def _tell(renewal: "Renewal", num_sections: int) -> None:
    from mclstexp.messages import some_of

    for part in renewal.damaged:
        print(f"damaged, and made again: {part}")
    if renewal.stale:
        print(f"removed, as the tile table has cut them again or has them no more: {some_of(renewal.stale)}")
    print(f"computed {len(renewal.computed)} section(s), kept {num_sections - len(renewal.computed)}")


if __name__ == "__main__":
    run(main)
