"""A training step of the contrastive towers over tiles in the device's memory, as a single worker takes it."""

import torch

from mclstexp.config import Config, override
from mclstexp.model.towers import build_network
from mclstexp.training.share import Share
from mclstexp.training.step import lone_rank, train_step

SENTENCE = 128
GENES = 1000


def small(settings: dict[str, object]) -> dict[str, object]:
    """Returns settings with a tiny network on small tiles."""
    tiny = {"model.image_encoder": "small_cnn", "tiles.size_px": 32, "model.spot_width": 16, "model.spot_layers": 1}
    return settings | tiny


class SyntheticStep:
    """The towers, their optimiser, and batches of noise."""

    def __init__(self, settings: dict[str, object], device: torch.device, num_genes: int = GENES) -> None:
        self.config = override(Config(), settings)
        self.device, self.size_px, self.num_genes = device, self.config.tiles.size_px, num_genes
        torch.manual_seed(0)
        model = build_network(self.config.model, num_genes, 0, self.size_px)
        model = model.to(device).to(memory_format=torch.channels_last)
        if self.config.train.compile:
            model.image_tower.compile()
        self.rank_state = lone_rank(self.config, model, total_steps=1000)

    def batch(self, num_spots: int, sentence: int = SENTENCE) -> Share:
        """Returns a batch of whole sentences on the device."""
        shape, device = (num_spots // sentence, sentence), self.device
        size = (num_spots, self.size_px, self.size_px, 3)
        return {
            "tiles": torch.randint(0, 256, size, dtype=torch.uint8, device=device),
            "slots": torch.arange(num_spots, device=device),
            "expression": torch.rand((*shape, self.num_genes), device=device),
            "position": 300 * torch.randn((*shape, 2), device=device),
            "mask": torch.ones(shape, dtype=torch.bool, device=device),
        }

    def take(self, batch: Share) -> None:
        """Takes one optimiser step."""
        train_step(self.rank_state, batch)
        self.rank_state.state.step += 1
