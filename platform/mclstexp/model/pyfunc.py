"""The registered model version as an MLflow pyfunc, loaded from code instead of a pickle.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(frame)` takes one column of encoded tiles for each view of
the model, `image` and perhaps `image_wide` (JPEG or PNG, at the model's size and resolution), and returns one column
per panel gene, in the model's target unit. It embeds on the CPU, in this process; whole slides are the work of
`jobs/predict.py`. The weights of a frozen encoder that the version does not contain are looked for as `frozen.py` says.

A program model looks at a slide as a whole. The columns `x_um` and `y_um`, tile centres in micrometres, and `slide_id`,
which a single slide may do without, make the rows of a slide one answer, as `jobs/predict.py` gives it for these tiles.
Without positions each tile is answered on its own, without neighbours, at the training level. The column `partial` of
the result says which it was; only program models have it. Other models take positions too, and do without.
"""

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from mclstexp.data.schema import IMAGE_WIDE
from mclstexp.errors import ModelError
from mclstexp.messages import some_of
from mclstexp.model.answer import answerer_of
from mclstexp.model.decode import SlideDecoder, TileScores
from mclstexp.model.version import ModelVersion
from mclstexp.slides.codec import decode_tile

PARTIAL = "partial"
"""Column that is true where an answer knows nothing of the tile's slide."""
_XY, _SLIDE = ("x_um", "y_um"), "slide_id"
_BATCH = 128


class RegisteredModel(PythonModel):
    """Predicts expression from encoded tiles."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the model version from its folder among the artifacts."""
        self._version = ModelVersion.load(context.artifacts["version"])
        self._answer = answerer_of(self._version).build(torch.device("cpu"))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, object] | None = None
    ) -> pd.DataFrame:
        """Returns predicted expression, one row per tile, one column per gene.

        Raises:
            ModelError: a tile has another size than the model's, or a position or slide is missing.
        """
        frame = model_input.reset_index(drop=True)
        has_positions = _require_positions(frame)
        names = self._version.panel.names()
        if self._version.programs is None:
            return pd.DataFrame(self._answered(frame).values, columns=names)
        decoder = self._version.programs.decoder()
        found = (
            self._of_slides(frame, decoder) if has_positions else decoder.predict_apart(self._answered(frame).values)
        )
        return pd.DataFrame(found, columns=names).assign(**{PARTIAL: not has_positions})

    def _of_slides(self, frame: pd.DataFrame, decoder: SlideDecoder) -> np.ndarray:
        """Returns the expression of tiles with positions, float32 (n, G), slide by slide."""
        found = np.zeros((len(frame), len(self._version.panel)), np.float32)
        slides = frame[_SLIDE].to_numpy() if _SLIDE in frame else np.zeros(len(frame))
        for slide in pd.unique(slides):
            rows = np.flatnonzero(slides == slide)
            tiles = frame.iloc[rows]
            found[rows] = decoder.predict(self._answered(tiles), tiles[list(_XY)].to_numpy(np.float64))
        return found

    def _answered(self, frame: pd.DataFrame) -> TileScores:
        """Returns what the model answers tiles with: `TileAnswers.values` of all, and their sums."""
        batches = [frame.iloc[start : start + _BATCH] for start in range(0, len(frame), _BATCH)]
        found = [self._answer(self._decoded(batch), np.ones(len(batch), bool)) for batch in batches]
        return TileScores(
            np.concatenate([each.values for each in found]), np.sum([each.sums for each in found], axis=0)
        )

    def _decoded(self, frame: pd.DataFrame) -> tuple[np.ndarray, ...]:
        """Returns the tiles of each view, uint8 (n, size, size, 3)."""
        views = self._version.config.model.image_views
        return tuple(np.stack([self._tile(data, view) for data in frame[view]]) for view in views)

    def _tile(self, data: bytes, view: str) -> np.ndarray:
        tile, size = decode_tile(data), self._version.view_px(view)
        mpp = self._version.wide[1] if view == IMAGE_WIDE and self._version.wide else self._version.mpp
        if tile.shape != (size, size, 3):
            raise ModelError(
                f"the model takes tiles of {size} px at {mpp:.4g} um/px as {view}, got {tile.shape[1]} x "
                f"{tile.shape[0]} px; cut them at the model's size and resolution"
            )
        return tile


def _require_positions(frame: pd.DataFrame) -> bool:
    """Returns whether tiles have positions.

    Raises:
        ModelError: only some of a position's columns are given, or a value is missing; names the first rows.
    """
    given = [name for name in (*_XY, _SLIDE) if name in frame]
    if not given:
        return False
    missing = [name for name in _XY if name not in frame]
    if missing:
        raise ModelError(
            f"the frame has {', '.join(given)} without {', '.join(missing)}: give both coordinates of the tiles' "
            "centres, in micrometres, or none of these columns"
        )
    for name in given:
        is_bad = frame[name].isna() if name == _SLIDE else ~np.isfinite(frame[name].to_numpy(np.float64))
        rows = np.flatnonzero(is_bad)
        if len(rows):
            raise ModelError(
                f"{len(rows)} of {len(frame)} tiles have no {name}, rows {some_of(list(map(str, rows)))}: give it for "
                "all tiles, or predict those without a position in a call of their own, without these columns"
            )
    return True


set_model(RegisteredModel())
