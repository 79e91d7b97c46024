"""What jobs say about an encoder and the tiles that it is given."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mclstexp.config import Config
    from mclstexp.data.schema import Manifest
    from mclstexp.settings import ModelConfig


def warn_of_encoder(config: "ModelConfig", manifest: "Manifest") -> None:
    """Prints that a frozen encoder has random weights, or one was trained at another resolution than the tiles have.

    A wide view is meant to have another one.
    """
    from mclstexp.model.encoders import resolution_warning

    warnings: list[str | None] = []
    if config.freeze_encoder and config.image_weights == "random":
        warnings.append(
            f"{config.image_encoder} has random weights and learns nothing, because it is frozen; give its own with "
            "model.image_weights"
        )
    if "image" in config.image_views:
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
