"""What a step computes of a rank's share: its tiles augmented, and both towers.

In micro-batches the image tower keeps the activations of one part of the tiles at a time: each part runs once for the
loss of the whole batch and again, with the same random state, when the backward pass reaches it. Loss and gradients are
those of the whole batch, as with the cached gradients of Gao et al. 2021 (https://arxiv.org/abs/2101.06983), at the
price of a second forward pass. There is one backward pass, so that several ranks average their gradients once.

Shapes: n tiles, S sentences, L spots of a sentence, D embedding.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mclstexp.config import Config
from mclstexp.model.augment import augmented
from mclstexp.model.towers import Network, TwoTowers, uses_bf16


class Forward(nn.Module):
    """A network behind augmentation, in the arithmetic of `train.precision`.

    Args:
        model: the network.
        config: the settings.
        micro_batch: tiles that the image tower keeps the activations of at a time; None: all.
    """

    def __init__(self, model: Network, config: Config, micro_batch: int | None = None) -> None:
        super().__init__()
        self.model, self.micro_batch = model, micro_batch
        self._reads_features = config.model.freeze_encoder
        self._augmentation, self._precision = config.train.augmentation, config.train.precision
        self._shares_spots = config.train.batching == "random_spots" and config.train.num_workers > 1

    def forward(
        self, tiles: torch.Tensor, draws: Sequence[torch.Tensor], *sentence: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns image embeddings (n, D) and spot embeddings (S, L, D); in direct regression expression and None.

        Args:
            tiles: as in `Share`.
            draws: of all tiles, for their augmentation; none for stored features.
            sentence: expression, position and mask, as `TwoTowers.embed_spots` takes them.
        """
        parts = self._parts(tiles, draws)
        # The last part comes first in the backward pass: it keeps its activations until then.
        images = [checkpoint(self.embed_images, *part, use_reentrant=False) for part in parts[:-1]]
        images.append(self.embed_images(*parts[-1]))
        spots = None
        if isinstance(self.model, TwoTowers):
            if self._shares_spots:  # ranks drop the same values, however many numbers their images have drawn
                torch.manual_seed(torch.initial_seed())
            with self._autocast(tiles.device):
                spots = self.model.embed_spots(*sentence)
        return torch.cat(images), spots

    def embed_images(self, tiles: torch.Tensor, *draws: torch.Tensor) -> torch.Tensor:
        """Returns what the images became, (n, D), of some tiles and their draws."""
        images = tiles
        if not self._reads_features:
            images = augmented(tiles, self._augmentation, draws).contiguous(memory_format=torch.channels_last)
        with self._autocast(tiles.device):
            return self.model.embed_images(images) if isinstance(self.model, TwoTowers) else self.model(images)

    def _parts(self, tiles: torch.Tensor, draws: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        size = self.micro_batch or len(tiles)
        return list(zip(*(values.split(size) for values in (tiles, *draws)), strict=True))

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(self._precision, device))
