"""The registered model version as an MLflow pyfunc, loaded from code instead of a pickle.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(frame)` takes one column of encoded tiles for each view of
the model, `image` and perhaps `image_wide` (JPEG or PNG, at the model's size and resolution), and returns one column
per panel gene, in the model's target unit. It embeds on the CPU, in this process; whole slides are the work of
`jobs/predict.py`. The weights of a frozen encoder that the version does not contain are looked for as `frozen.py` says.
"""

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from mclstexp.data.schema import IMAGE_WIDE
from mclstexp.errors import ModelError
from mclstexp.model.embed import network_of
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import decode_tile

_BATCH = 128


class RegisteredModel(PythonModel):
    """Predicts expression from encoded tiles."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the model version from its folder among the artifacts."""
        self._version = ModelVersion.load(context.artifacts["version"])
        self._embed = network_of(self._version).build(torch.device("cpu"))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, object] | None = None
    ) -> pd.DataFrame:
        """Returns predicted expression, one row per tile, one column per gene."""
        views = [
            np.stack([self._decoded(data, view) for data in model_input[view]])
            for view in self._version.config.model.image_views
        ]
        starts = range(0, len(views[0]), _BATCH)
        queries = [self._embed(*(tiles[start : start + _BATCH] for tiles in views)) for start in starts]
        found = self._version.predict(np.concatenate(queries))
        return pd.DataFrame(found.prediction, columns=self._version.panel.names())

    def _decoded(self, data: bytes, view: str) -> np.ndarray:
        tile, size = decode_tile(data), self._version.view_px(view)
        mpp = self._version.wide[1] if view == IMAGE_WIDE and self._version.wide else self._version.mpp
        if tile.shape != (size, size, 3):
            raise ModelError(
                f"the model takes tiles of {size} px at {mpp:.4g} um/px as {view}, got {tile.shape[1]} x "
                f"{tile.shape[0]} px; cut them at the model's size and resolution"
            )
        return tile


set_model(RegisteredModel())
