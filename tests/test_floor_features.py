"""What the floors of a frozen model see, by stored features of random numbers: no encoder runs, and no Ray."""

from pathlib import Path

import numpy as np
import pytest
from feature_tables import section_blocks, write
from small_table import NAMES, make_table, random_counts

from mclstexp.config import Config, override
from mclstexp.data.genes import GenePanel
from mclstexp.data.spots import make_reader
from mclstexp.evaluation import floors
from mclstexp.evaluation.floors import Seen, floor_features
from mclstexp.model.extract import wanted
from mclstexp.model.frozen import frozen_encoder
from mclstexp.model.version import ModelVersion, TrainingRecord
from mclstexp.progress import hidden

OWN, ALL, PROBE = "ridge on frozen small_cnn", "ridge on the model's features", "HEST-bench probe"
BOTH = ("image", "image_wide")
RECORD = TrainingRecord(
    manifest_digest="", protocol="patient", sections=("A1",), patients=("A",), validation_sections=(), test_sections=(),
    epochs=1,
)  # fmt: skip


def _seen(
    folder: Path, views: tuple[str, ...], layers: tuple[str, ...], stored: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, Seen], list[dict[str, np.ndarray]]]:
    """Returns what floors see of a model of these views and layers, and the first stored table's blocks of section B1.

    `stored` are the layers of each feature table of the model's own encoder.
    """
    settings = {"model.image_encoder": "small_cnn", "model.freeze_encoder": True, "train.precision": "fp32"}
    config = override(Config(), settings | {"model.image_views": views, "model.image_layers": layers})
    manifest = make_table(folder, {"A1": random_counts(9, 0), "B1": random_counts(7, 1)})
    manifest = manifest.model_copy(update={"schema_version": 5, "wide_px": 8, "wide_mpp": 4.0})
    own = frozen_encoder(config.model, 8, seed=7)
    encoders = [frozen_encoder(config.model.model_copy(update={"image_layers": each}), 8, 7) for each in stored]
    blocks = []
    for encoder in [*encoders, floors.floor_encoders(config.model, 8, None)["random"]]:
        plain = wanted(config).plain_table(manifest, encoder.record, "fp32")
        for entry in manifest.sections:
            blocks.append(section_blocks(plain, entry, len(blocks)))
            write(folder, plain, entry, blocks[-1])
    reader = make_reader(str(folder), manifest, GenePanel.from_names(NAMES), config, ["A1"])
    model = ModelVersion(config, GenePanel.from_names(NAMES), (8, 1.0), 0, RECORD, {}, None, encoder=own)
    return floor_features(model, reader, ["A1", "B1"], None, hidden, str(folder / "scratch")), blocks[1]


def _joined(blocks: list[dict[str, np.ndarray]], *columns: str) -> np.ndarray:
    return np.concatenate([np.concatenate([sentence[name] for name in columns], axis=1) for sentence in blocks])


@pytest.mark.parametrize(
    ("views", "layers"),
    [(("image",), ("third", "pooled")), (BOTH, ("pooled",)), (BOTH, ("third", "pooled")), (("image_wide",), ())],
)
def test_the_probe_sees_the_own_feature_and_another_ridge_all(
    tmp_path: Path, views: tuple[str, ...], layers: tuple[str, ...]
) -> None:
    seen, blocks = _seen(tmp_path, views, layers, (layers,))
    assert list(seen) == ["ridge on RGB", "ridge on random small_cnn", ALL, OWN, PROBE]
    np.testing.assert_array_equal(seen[OWN].sections["B1"], _joined(blocks, "image/pooled"))
    assert seen[OWN].widths == (128,)
    assert seen[PROBE] is seen[OWN]
    columns = [f"{view}/{layer}" for view in views for layer in layers or ("pooled",)]
    np.testing.assert_array_equal(seen[ALL].sections["B1"], _joined(blocks, *columns))
    assert seen[ALL].widths == tuple({"third": 96, "pooled": 128}[name.split("/")[1]] for name in columns)
    assert seen["ridge on random small_cnn"].widths == seen[ALL].widths


def test_a_model_on_the_own_feature_alone_has_one_ridge(tmp_path: Path) -> None:
    for folder, layers in (("named", ("pooled",)), ("usual", ())):
        (tmp_path / folder).mkdir()
        seen, _ = _seen(tmp_path / folder, ("image",), layers, (layers,))
        assert list(seen) == ["ridge on RGB", "ridge on random small_cnn", OWN, PROBE]


def test_the_own_feature_may_be_in_another_table(tmp_path: Path) -> None:
    seen, blocks = _seen(tmp_path, ("image",), ("third",), (("pooled",), ("third",)))
    np.testing.assert_array_equal(seen[OWN].sections["B1"], _joined(blocks, "image/pooled"))
    assert (seen[OWN].widths, seen[ALL].widths) == ((128,), (96,))
