"""Symmetric InfoNCE in blocks of rows: the matrix of all similarities is never held as a whole.

The loss needs the logarithm of the sum of exponentials of each row and each column. Rows are complete within a block,
columns are summed up from block to block, and the backward pass computes each block again. That is one more matrix
product than with the whole matrix, against fewer passes over memory; the result is exact.

Shapes: N slots (some empty), D channels, B rows of a block.
"""

from collections.abc import Iterator

import torch

BLOCK_NUMBERS = 2**22
"""Numbers in a block of similarities, at most: 16 MiB."""
_LOWEST = torch.finfo(torch.float32).min


def infonce(query_ND: torch.Tensor, key_ND: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    """Returns the mean of row-wise and column-wise cross-entropy of queryT key against the identity, a scalar.

    Args:
        query_ND: float32 (N, D); multiply them by the scale of the logits before.
        key_ND: float32 (N, D); slot i belongs to query i.
        valid_N: bool (N,); False slots are neither queries nor keys. Without any the loss is 0.
    """
    loss: torch.Tensor = _InfoNCE.apply(query_ND, key_ND, valid_N)
    return loss


class _InfoNCE(torch.autograd.Function):
    """Keeps the two sums of each slot for the backward pass, and no similarity."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query_ND: torch.Tensor, key_ND: torch.Tensor, valid_N: torch.Tensor
    ) -> torch.Tensor:
        by_row = []
        highest, total = query_ND.new_full((len(query_ND),), _LOWEST), query_ND.new_zeros(len(query_ND))
        for _, logits_BN in _blocks(query_ND, key_ND, valid_N):
            by_row.append(logits_BN.logsumexp(dim=1))
            higher = torch.maximum(highest, logits_BN.amax(dim=0))
            total = total * (highest - higher).exp() + (logits_BN - higher).exp_().sum(dim=0)
            highest = higher
        sums = [torch.where(valid_N, each, 0.0) for each in (torch.cat(by_row), highest + total.log())]
        ctx.save_for_backward(query_ND, key_ND, valid_N, *sums)
        own = (query_ND * key_ND).sum(dim=1)
        return torch.where(valid_N, (sums[0] + sums[1]) / 2 - own, 0.0).sum() / _number(valid_N)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        query_ND, key_ND, valid_N, row_sum, column_sum = ctx.saved_tensors  # type: ignore[attr-defined]
        share = torch.where(valid_N, gradient / _number(valid_N), 0.0)[:, None]
        d_query, d_key = torch.empty_like(query_ND), torch.zeros_like(key_ND)
        for rows, logits_BN in _blocks(query_ND, key_ND, valid_N):
            both_BN = (logits_BN - row_sum[rows, None]).exp_()
            both_BN += logits_BN.sub_(column_sum).exp_()
            torch.mm(both_BN, key_ND, out=d_query[rows])
            d_key.addmm_(both_BN.T, query_ND[rows])
        return (d_query / 2 - key_ND) * share, (d_key / 2 - query_ND) * share, None


def _blocks(
    query_ND: torch.Tensor, key_ND: torch.Tensor, valid_N: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields rows and their similarities (B, N) to all keys, -inf where a slot is empty; each may be overwritten."""
    penalty_N = torch.where(valid_N, 0.0, -torch.inf)
    size = max(1, BLOCK_NUMBERS // max(1, len(key_ND)))
    for start in range(0, len(query_ND), size):
        rows = slice(start, start + size)
        yield rows, (penalty_N[rows, None] + penalty_N).addmm_(query_ND[rows], key_ND.T)


def _number(valid_N: torch.Tensor) -> torch.Tensor:
    return valid_N.sum().clamp(min=1)
