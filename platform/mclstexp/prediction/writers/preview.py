"""The preview of a slide: the outline of its tissue and the predicted tiles, as its inspection drew them."""

from pathlib import Path

from mclstexp import storage
from mclstexp.prediction.parts import PREVIEW
from mclstexp.prediction.writers.slide import PredictedSlide


def write_preview(path: Path, slide: PredictedSlide) -> None:
    """Writes a JPEG.

    Raises:
        FileNotFoundError: the staging folder has none.
    """
    path.write_bytes(storage.read(storage.join(slide.staging, PREVIEW)))
