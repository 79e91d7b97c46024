"""The losses by name, and the gathering of all ranks' embeddings that they are computed over.

Every loss has the signature of `Loss`, so that a new one is a function and a line in `LOSSES`. Each rank computes the
whole loss over the global batch: the matrix of similarities is small beside the image tower, and the negatives are
those of all ranks.

Shapes: N slots of all ranks' batches (some empty), D channels of the embedding, or genes in direct regression.
"""

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mclstexp.config import Config
from mclstexp.errors import ConfigError
from mclstexp.messages import did_you_mean
from mclstexp.model.infonce import infonce

REGRESSION = "regression"
"""The loss of `model.predictor=regression`; the others are values of `train.positives`."""
SCORE_TEMPERATURE = 0.1
"""Divides the cosines of program scores in the targets of `program_loss`."""


class Loss(Protocol):
    """Compares what the images and the spots of a global batch became."""

    def __call__(
        self, image_ND: torch.Tensor, spot_ND: torch.Tensor, valid_N: torch.Tensor, logit_scale: torch.Tensor
    ) -> torch.Tensor:
        """Returns a scalar; 0 with zero gradient if no slot is valid.

        Args:
            image_ND: image embeddings or predicted expression, float32 (N, D).
            spot_ND: spot embeddings or measured expression, float32 (N, D); slot i of both is the same spot.
            valid_N: bool (N,); False slots are empty: they are neither queries nor negatives.
            logit_scale: 1 / temperature, scalar.
        """


def pairs_loss(
    image_ND: torch.Tensor, spot_ND: torch.Tensor, valid_N: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE: a tile's only positive is its own spot. Arguments as `Loss`.

    The mean of row-wise and column-wise cross-entropy of S = scale * spot imageT against the identity: InfoNCE (van
    den Oord et al. 2018, https://arxiv.org/abs/1807.03748) in its symmetric form (CLIP, Radford et al. 2021,
    https://arxiv.org/abs/2103.00020), as mclSTExp uses it (2024, https://arxiv.org/abs/2407.08216). S is computed in
    blocks (`infonce`).
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        images, spots = _valid(image_ND, valid_N), _valid(spot_ND, valid_N)
        return infonce(logit_scale.float() * spots, images, valid_N)


def soft_loss(
    image_ND: torch.Tensor, spot_ND: torch.Tensor, valid_N: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """`pairs_loss` with soft targets: similar spots are positives too. Arguments as `Loss`.

    A row's target is a softmax of the mean similarity within images and within spots, divided by the scale (BLEEP,
    Xie et al. 2023, https://arxiv.org/abs/2306.01859).
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        images, spots, scale = _valid(image_ND, valid_N), _valid(spot_ND, valid_N), logit_scale.float()
        together_NN = _with_itself(valid_N[:, None] & valid_N)
        similarity_NN = (images @ images.T + spots @ spots.T) / (2 * scale)
        target_NN = similarity_NN.masked_fill(~together_NN, -torch.inf).softmax(dim=1)
        loss_N = _both_ways(scale * spots @ images.T, target_NN, together_NN)
        return (loss_N * valid_N).sum() / valid_N.sum().clamp(min=1)


def regression_loss(
    image_ND: torch.Tensor, spot_ND: torch.Tensor, valid_N: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over the valid slots and their measured genes. Arguments as `Loss`; the scale has no effect.

    A gene that a spot's section does not measure is NaN in `spot_ND`: it has no error, and no gradient.
    """
    known_ND = valid_N[:, None] & ~spot_ND.isnan()
    error_ND = torch.where(known_ND, image_ND - spot_ND, 0.0)
    return error_ND.square().sum() / known_ND.sum().clamp(min=1)


def program_loss(
    image_ND: torch.Tensor,
    spot_ND: torch.Tensor,
    valid_N: torch.Tensor,
    logit_scale: torch.Tensor,
    scores_NR: torch.Tensor,
    sentence_N: torch.Tensor,
) -> torch.Tensor:
    """Returns symmetric InfoNCE within sentences, in which spots of similar programs are positives too; a scalar.

    A spot's target over the spots of its own sentence is the softmax of the cosine of program scores over
    `SCORE_TEMPERATURE`, by rows of either side. A sentence counts by its spots, and over the logarithm of their number,
    the loss of towers that tell nothing; one of a single spot has none.

    Args:
        image_ND, spot_ND, valid_N, logit_scale: as `Loss`.
        scores_NR: program scores within sections, float32 (N, R).
        sentence_N: index of each slot's sentence, int64 (N,).
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        images, spots = _valid(image_ND, valid_N), _valid(spot_ND, valid_N)
        scores = F.normalize(_valid(scores_NR, valid_N), dim=1)
        together_NN = _with_itself((sentence_N[:, None] == sentence_N) & valid_N[:, None] & valid_N)
        size_N = together_NN.sum(dim=1)
        weight_N = (size_N > 1) / size_N.clamp(min=2).log() / valid_N.sum().clamp(min=1)
        target_NN = (scores @ scores.T / SCORE_TEMPERATURE).masked_fill(~together_NN, -torch.inf).softmax(dim=1)
        loss_N = _both_ways(logit_scale.float() * spots @ images.T, target_NN, together_NN)
        return (weight_N * loss_N).sum()


def _valid(rows_ND: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    """Returns the rows in float32, with zeros in the empty slots.

    The losses mask empty slots. Taking the valid rows out would make a GPU wait until the host knows their number.
    """
    return torch.where(valid_N[:, None], rows_ND.float(), 0.0)


def _with_itself(together_NN: torch.Tensor) -> torch.Tensor:
    """Returns the pairs and each slot with itself, so that a softmax over an empty slot's row is finite."""
    return together_NN | torch.eye(len(together_NN), dtype=torch.bool, device=together_NN.device)


def _both_ways(logits_NN: torch.Tensor, target_NN: torch.Tensor, together_NN: torch.Tensor) -> torch.Tensor:
    """Returns the mean of row-wise and column-wise cross-entropy with the same targets, (N,)."""
    by_row, by_column = (_cross_entropy_within(each, target_NN, together_NN) for each in (logits_NN, logits_NN.T))
    return (by_row + by_column) / 2


def _cross_entropy_within(logits_NN: torch.Tensor, target_NN: torch.Tensor, together_NN: torch.Tensor) -> torch.Tensor:
    """Returns each row's cross-entropy over the columns that it is together with, (N,)."""
    log_shares_NN = logits_NN.masked_fill(~together_NN, -torch.inf).log_softmax(dim=1)
    return -(target_NN * log_shares_NN.masked_fill(~together_NN, 0.0)).sum(dim=1)


LOSSES: dict[str, Loss] = {
    "pairs": pairs_loss,
    "soft": soft_loss,
    REGRESSION: regression_loss,
}


def require_loss(config: Config) -> Loss:
    """Returns the loss that the settings choose: direct regression's own, else `train.positives`.

    Raises:
        ConfigError: `train.positives` names no loss between images and spots.
    """
    known, name = LOSSES.keys() - {REGRESSION}, config.train.positives
    if name not in known:
        raise ConfigError(f"train.positives={name} is not a loss; {did_you_mean(name, sorted(known))}")
    return LOSSES[REGRESSION if config.model.predictor == "regression" else name]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Returns all ranks' rows, (n, ...) on each, concatenated by rank with gradient; unchanged without a group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    """All-gather whose backward is exact if every rank computes the same full loss and DDP averages gradients.

    The gradient of the gathered matrix is then the same on all ranks, so each rank takes its own slice without a
    second collective; multiplied by the world size it survives the averaging.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        world_size = dist.get_world_size()
        return gradient.chunk(world_size)[dist.get_rank()] * world_size
