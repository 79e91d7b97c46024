"""Time of a training step of an image tower on this machine's CPU, with and without glibc keeping freed memory.

    python benchmarks/step_speed.py --encoder densenet121 --size-px 224 --tiles 64

Each of the two runs in its own process, because glibc reads its settings at the start, and there in a thread, as Ray
Train runs its workers. Run it on an idle machine.
"""

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch  # noqa: E402

from mclstexp.cluster import KEEPING_MEMORY  # noqa: E402
from mclstexp.model.towers import ImageTower, native_bf16  # noqa: E402
from mclstexp.settings import ModelConfig  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="densenet121")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--tiles", type=int, default=64, help="tiles per batch")
    parser.add_argument("--rounds", type=int, default=6, help="steps; the first is left out")
    parser.add_argument("--measure", action="store_true", help="measure in this process, with its environment")
    arguments = parser.parse_args()
    if arguments.measure:
        thread = threading.Thread(target=measure, args=(arguments,))
        thread.start()
        thread.join()
        return
    for name, changed in (("system default", {}), ("freed memory kept", KEEPING_MEMORY["env_vars"])):
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--measure"], env=os.environ | changed, check=True)


def measure(arguments: argparse.Namespace) -> None:
    device = torch.device("cpu")
    tower = ImageTower(ModelConfig(image_encoder=arguments.encoder), arguments.size_px)
    tower = tower.to(memory_format=torch.channels_last).train()
    shape = (arguments.tiles, 3, arguments.size_px, arguments.size_px)
    tiles = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16(device)):
            loss = tower(tiles).float().square().mean()
        loss.backward()
        times.append(1000 * (time.perf_counter() - started) / arguments.tiles)
    listed = ", ".join(f"{value:.0f}" for value in times[1:])
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    about = f"{torch.get_num_threads()} threads, bf16 {native_bf16(device)}, peak memory {peak_gib:.1f} GiB"
    print(f"  {listed} ms per tile, {about}", flush=True)


if __name__ == "__main__":
    main()
