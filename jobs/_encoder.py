"""What jobs say about an encoder and the tiles that it is given."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.data.schema import Manifest
    from mclstexp.settings import ModelConfig


NO_WIDE_VIEW = (
    "the tile table has no wide view, and the model does without: in our four tests that changed PCC all by +.002, "
    "-.003, -.007 and -.021 (docs/results.md); cut it with jobs/prepare.py --tiles.wide_um 618"
)


def warn_of_encoder(config: "ModelConfig", manifest: "Manifest") -> None:
    """Prints that a frozen encoder has random weights, or one was trained at another resolution than the tiles have.

    A wide view is meant to have another one; where `all` views are asked for, its absence is said.
    """
    from mclstexp.data.schema import IMAGE, IMAGE_WIDE
    from mclstexp.model.encoders import resolution_warning

    warnings: list[str | None] = []
    if config.freeze_encoder and config.image_weights == "random":
        warnings.append(
            f"{config.image_encoder} has random weights and learns nothing, because it is frozen; give its own with "
            "model.image_weights"
        )
    views: tuple[str, ...] = config.image_views
    if views == ("all",):
        views = manifest.views
        warnings.append(None if IMAGE_WIDE in views else NO_WIDE_VIEW)
    if IMAGE in views:
        warnings.append(resolution_warning(config.image_encoder, manifest.tile_size_px, manifest.mpp))
    for warning in filter(None, warnings):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def warn_of_augmentation(config: "Config") -> None:
    """Prints that stored features of plain tiles are not augmented, where the settings ask for augmentation."""
    train = config.train
    if config.model.freeze_encoder and train.epochs and train.augmentation != "none" and not train.feature_draws:
        print(
            f"warning: train.augmentation={train.augmentation} has no effect on stored features of plain tiles; give "
            "train.feature_draws a number of draws, or train.augmentation none",
            file=sys.stderr,
            flush=True,
        )
