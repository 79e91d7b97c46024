"""What jobs say about an encoder and the tiles that it is given."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mclstexp.data.schema import Manifest
    from mclstexp.settings import ModelConfig


def warn_of_resolution(config: "ModelConfig", manifest: "Manifest") -> None:
    """Prints that the encoder was trained at another resolution than the tiles have; a wide view is meant to differ."""
    from mclstexp.model.encoders import resolution_warning

    warning = resolution_warning(config.image_encoder, manifest.tile_size_px, manifest.mpp)
    if warning and "image" in config.image_views:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
