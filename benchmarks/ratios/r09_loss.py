"""R9: symmetric InfoNCE over 12,288 spots and 256 channels, forward and backward: in blocks of rows / the full matrix.

    python benchmarks/bench.py --only R9

Each round is two fresh processes, because the second is about memory too: what a loss adds to the peak of its process.
Blocks may take a quarter of what the matrix takes, and their gradient may differ by 1e-5 of its norm; else it fails.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import TypedDict

import torch
import torch.nn.functional as F
from goals import say

from mclstexp.model.losses import pairs_loss

SPOTS, CHANNELS, SCALE = 12_288, 256, 14.3
MAX_MEMORY, MAX_ERROR = 0.25, 1e-5


class Measured(TypedDict):
    """What one process found."""

    seconds: float
    mib: float


def full_matrix(
    image_ND: torch.Tensor, spot_ND: torch.Tensor, valid_N: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Returns the loss as it is usually written."""
    logits_NN, own = scale * spot_ND @ image_ND.T, torch.arange(len(image_ND))
    return (F.cross_entropy(logits_NN, own) + F.cross_entropy(logits_NN.T, own)) / 2


def inputs(num_spots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns unit vectors of images and of spots that resemble them, all valid, and the scale."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(num_spots, CHANNELS, generator=generator) for _ in range(2))
    image_ND, spot_ND = (F.normalize(each, dim=1).requires_grad_() for each in (images, images + 2 * noise))
    return image_ND, spot_ND, torch.ones(num_spots, dtype=torch.bool), torch.tensor(SCALE, requires_grad=True)


def gradients(loss: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the gradients of both embeddings and the scale as one vector."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, (tensors[0], tensors[1], tensors[3]))])


def error_of_gradient(num_spots: int) -> float:
    """Returns the norm of the difference between both losses' gradients, by the gradient's norm."""
    tensors = inputs(num_spots)
    ours, theirs = (gradients(loss(*tensors), tensors) for loss in (pairs_loss, full_matrix))
    return float((ours - theirs).norm() / theirs.norm())


def measure(ours: bool) -> Measured:
    """Returns CPU-seconds and additional memory of one loss in this process."""
    torch.set_num_threads(1)
    loss_of = pairs_loss if ours else full_matrix
    small = inputs(256)
    gradients(loss_of(*small), small)  # so that what a first call loads is not counted
    tensors = inputs(SPOTS)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    gradients(loss_of(*tensors), tensors)
    seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mib": (peak - before) / 1024}


def in_process(ours: bool) -> Measured:
    """Returns what a fresh process measures."""
    command = [sys.executable, __file__, "--measure", "ours" if ours else "theirs"]
    found: Measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="unused")
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure == "ours")))
        return
    pairs = [(in_process(ours=True), in_process(ours=False)) for _ in range(arguments.rounds)]
    share = max(ours["mib"] / theirs["mib"] for ours, theirs in pairs)
    error = error_of_gradient(SPOTS)
    assert share <= MAX_MEMORY, f"blocks take {share:.2f} of the matrix's memory"
    assert error <= MAX_ERROR, f"the gradients differ by {error:.1e}"
    ours, theirs = pairs[0]
    detail = (
        f"{CHANNELS} channels, forward and backward; additional memory {ours['mib']:.0f} and {theirs['mib']:.0f} MiB, "
        f"gradient differs by {error:.0e}"
    )
    say("R9", [(ours["seconds"], theirs["seconds"]) for ours, theirs in pairs], "CPU-s", detail)


if __name__ == "__main__":
    main()
