"""The symmetric contrastive loss over global negatives, and the squared error of direct regression.

Shapes: N slots of all ranks' batches (some empty), D embedding, G genes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def contrastive_loss(
    image_ND: torch.Tensor,
    spot_ND: torch.Tensor,
    logit_scale: torch.Tensor,
    valid_N: torch.Tensor,
    soft: bool = False,
) -> torch.Tensor:
    """Returns the mean of row-wise and column-wise cross-entropy of S = scale * spot imageT against the identity.

    InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748) in its symmetric form (CLIP, Radford et al.
    2021, https://arxiv.org/abs/2103.00020), as mclSTExp uses it (2024, https://arxiv.org/abs/2407.08216).

    Args:
        image_ND: image embeddings, float32 (N, D); slot i of both belongs to the same spot.
        spot_ND: spot embeddings, float32 (N, D).
        logit_scale: 1 / temperature, scalar.
        valid_N: bool (N,); False slots are neither queries nor negatives.
        soft: the target of a row is not the identity but a softmax of the mean similarity within images and within
            spots, divided by the scale (BLEEP, Xie et al. 2023, https://arxiv.org/abs/2306.01859).

    Returns:
        Scalar; 0 with zero gradient where no slot is valid.
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        images, spots = image_ND[valid_N].float(), spot_ND[valid_N].float()
        if not len(images):
            return (image_ND.sum() + spot_ND.sum()) * 0.0 * logit_scale
        logits_NN = logit_scale.float() * spots @ images.T
        target = torch.arange(len(images), device=images.device)
        if soft:
            target = ((images @ images.T + spots @ spots.T) / (2 * logit_scale.float())).softmax(dim=1)
        return (F.cross_entropy(logits_NN, target) + F.cross_entropy(logits_NN.T, target)) / 2


def regression_loss(predicted_NG: torch.Tensor, truth_NG: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error over the valid slots and all genes, both float32 (N, G); 0 where none is valid."""
    if not valid_N.any():
        return predicted_NG.sum() * 0.0
    return F.mse_loss(predicted_NG[valid_N], truth_NG[valid_N])


class _Gather(torch.autograd.Function):
    """All-gather whose backward is exact when every rank computes the same full loss and DDP averages gradients.

    The gradient of the gathered matrix is then the same on all ranks, so that the own slice is known without a
    second collective; times the world size it survives the averaging.
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


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Returns all ranks' rows, (n, ...) on each, concatenated by rank with gradient; the same without a group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)
