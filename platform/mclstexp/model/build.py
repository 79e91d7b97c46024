"""The network that a configuration asks for."""

from mclstexp.model.regression import DirectRegression
from mclstexp.model.towers import TwoTowers
from mclstexp.settings import ModelConfig

Network = TwoTowers | DirectRegression


def build_network(config: ModelConfig, num_genes: int, num_positions: int, tile_size_px: int) -> Network:
    """Returns the two towers, or the direct regression, in training mode.

    Raises:
        ConfigError, ModelError: the image encoder or its weights cannot be had.
    """
    if config.predictor == "regression":
        return DirectRegression(config, num_genes, tile_size_px)
    return TwoTowers(config, num_genes, num_positions, tile_size_px)
