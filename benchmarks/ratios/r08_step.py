"""R8: a training step of `finetune.yaml` / one of the published recipe in float32, over the same tiles.

    python benchmarks/bench.py --only R8

Ours is the step that a training worker takes: bf16 where the CPU computes it (else float32), channels last, with
augmentation. The published one is written here from the paper's text (mclSTExp 2024, https://arxiv.org/abs/2407.08216):
torchvision's DenseNet-121 and a spot tower of two blocks in float32, channels first, Adam; its tiles come augmented.
Both take turns in this process, on one thread, and weights are random.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from goals import say
from torch import nn

from mclstexp.config import load_config, override
from mclstexp.model.towers import build_network, native_bf16
from mclstexp.training.share import share_of
from mclstexp.training.step import lone_rank, train_step

ROOT = Path(__file__).resolve().parents[2]
TILES, SIZE, GENES, POSITIONS = 32, 224, 785, 40


class PublishedBlock(nn.Module):
    """Pre-norm attention of 8 heads of 64 channels, and a feed-forward layer as wide as the genes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(GENES), nn.LayerNorm(GENES)
        self.qkv, self.out = nn.Linear(GENES, 3 * 512, bias=False), nn.Linear(512, GENES)
        self.ffn = nn.Sequential(nn.Linear(GENES, GENES), nn.GELU(), nn.Linear(GENES, GENES))

    def forward(self, spots_BG: torch.Tensor) -> torch.Tensor:
        """Returns (B, G): the spots of a batch attend to each other."""
        query, key, value = self.qkv(self.first(spots_BG)).view(-1, 3, 8, 64).permute(1, 2, 0, 3)
        attended = ((query @ key.transpose(1, 2) / 8).softmax(dim=-1) @ value).transpose(0, 1).flatten(1)
        spots_BG = spots_BG + self.out(attended)
        return spots_BG + self.ffn(self.second(spots_BG))


class PublishedHead(nn.Module):
    """p = W1 h + b1; v = LayerNorm(p + W2 GELU(p) + b2), 256 channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.refine, self.norm = nn.Linear(width, 256), nn.Linear(256, 256), nn.LayerNorm(256)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns embeddings (B, 256)."""
        projected = self.project(features)
        return self.norm(projected + self.refine(F.gelu(projected)))


class Published(nn.Module):
    """Both towers; the image features are DenseNet's after its last batch norm, without the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = torchvision.models.densenet121(weights=None).features
        self.column, self.row = nn.Embedding(POSITIONS, GENES), nn.Embedding(POSITIONS, GENES)
        self.blocks = nn.Sequential(PublishedBlock(), PublishedBlock())
        self.image_head, self.spot_head = PublishedHead(1024), PublishedHead(GENES)

    def forward(
        self, images: torch.Tensor, expression_BG: torch.Tensor, position_B2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the embeddings of images (B, 3, size, size) and of spots, (B, 256) each."""
        spots = expression_BG + self.column(position_B2[:, 0]) + self.row(position_B2[:, 1])
        return self.image_head(self.image_tower(images).mean(dim=(2, 3))), self.spot_head(self.blocks(spots))


def published_step(images: np.ndarray, expression: np.ndarray) -> Callable[[], object]:
    """Returns a function that takes a step of the published recipe."""
    model = Published().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-3)
    tiles = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    expression_BG, own = torch.from_numpy(expression), torch.arange(len(images))
    position_B2 = torch.randint(POSITIONS, (len(images), 2), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        image_BD, spot_BD = model(tiles, expression_BG, position_B2)
        logits_BB = spot_BD @ image_BD.T
        loss = (F.cross_entropy(logits_BB, own) + F.cross_entropy(logits_BB.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(images: np.ndarray, expression: np.ndarray) -> Callable[[], object]:
    """Returns a function that takes a step of `finetune.yaml` on one rank."""
    config = override(load_config(ROOT / "jobs/configs/finetune.yaml"), {"model.image_weights": "random"})
    torch.manual_seed(0)
    network = build_network(config.model, GENES, 0, SIZE).to(memory_format=torch.channels_last)
    rank_state = lone_rank(config, network, total_steps=100)
    position = np.random.default_rng(0).normal(0, 500, (len(images), 2)).astype(np.float32)
    arrays = {"image": images, "expression": expression, "position": position, "mask": np.ones(len(images), bool)}
    share = share_of({name: values[None] for name, values in arrays.items()})
    return lambda: train_step(rank_state, share)


def tiles_per_s(step: Callable[[], object]) -> float:
    """Returns the tiles per CPU-second of a step."""
    started = time.process_time()
    step()
    return TILES / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="unused")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (TILES, SIZE, SIZE, 3), np.uint8), rng.random((TILES, GENES), np.float32)
    ours, theirs = our_step(*batch), published_step(*batch)
    ours(), theirs()  # the first step allocates
    rounds = [(tiles_per_s(ours), tiles_per_s(theirs)) for _ in range(arguments.rounds)]
    arithmetic = "bf16" if native_bf16(torch.device("cpu")) else "float32"
    detail = f"{TILES} tiles of {SIZE} px, {arithmetic} channels last, batch norm frozen / float32 channels first"
    say("R8", rounds, "tiles/CPU-s", detail)


if __name__ == "__main__":
    main()
