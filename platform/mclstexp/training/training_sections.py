"""The training sections of a run with a frozen encoder, as what is fitted to them sees them."""

from collections.abc import Sequence
from functools import partial

from mclstexp.data.measured import read_measured
from mclstexp.data.spots import SpotReader
from mclstexp.model.training_spots import FeatureBlocks, TrainingSpots
from mclstexp.settings import TrainConfig


def training_spots(reader: SpotReader, section_ids: Sequence[str], train: TrainConfig) -> TrainingSpots:
    """Returns training sections with their stored features, of the plain tiles and of augmented draws."""
    features = reader.features
    assert features is not None, "a run with programs has a frozen encoder, whose features are stored"
    sections = [read_measured(reader, name) for name in section_ids]
    blocks = feature_blocks(features.encoder.widths, len(features.views))
    draws = [partial(features.read_section, draw=draw) for draw in range(train.feature_draws)]
    return TrainingSpots(sections, features.read_section, blocks, reader.target, draws, train.cross_fit)


def feature_blocks(layer_widths: tuple[int, ...], num_views: int) -> FeatureBlocks:
    """Returns the blocks of a model's features: neighbours see the last and the first layer of the first view.

    The slide's level is read from the last layer of the first view.
    """
    last = len(layer_widths) - 1
    return FeatureBlocks(layer_widths * num_views, tuple(dict.fromkeys((last, 0))), last)
