"""The registered model version as an MLflow pyfunc, loaded from code instead of a pickle.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(frame)` takes a column `image` of encoded tiles (JPEG or
PNG, at the model's size and resolution) and returns one column per panel gene, in the model's target unit. It embeds on
the CPU, in this process; whole slides are the work of `jobs/predict.py`.
"""

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

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
        tiles = np.stack([self._decoded(data) for data in model_input["image"]])
        queries = [self._embed(tiles[start : start + _BATCH]) for start in range(0, len(tiles), _BATCH)]
        found = self._version.predict(np.concatenate(queries))
        return pd.DataFrame(found.prediction, columns=self._version.panel.names())

    def _decoded(self, data: bytes) -> np.ndarray:
        tile, size = decode_tile(data), self._version.tile_size_px
        if tile.shape != (size, size, 3):
            raise ModelError(
                f"the model takes tiles of {size} px at {self._version.mpp:.4g} um/px, got {tile.shape[1]} x "
                f"{tile.shape[0]} px; cut them at the model's size and resolution"
            )
        return tile


set_model(RegisteredModel())
