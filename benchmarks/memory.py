"""What keeping freed memory is worth on this CPU: one training step with glibc's defaults and without, in turn.

    uv run python benchmarks/memory.py

Each round starts a fresh process for either side; the figure is the median over rounds of the ratio of their times.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

STEP = """
import sys, time, timm, torch
from tes.engine.compute import Compute, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
compute = Compute("cpu", "fp32", "channels_last", 0)
network = timm.create_model("mobilenetv2_100", num_classes=0).to(memory_format=torch.channels_last).train()
images = torch.rand(32, 3, 144, 144)
for step in range(8):
    if step == 3:
        began = time.perf_counter()
    network(compute.images(images)).square().mean().backward()
print((time.perf_counter() - began) / 5)
"""


def main() -> None:
    ratios = []
    for _ in range(5):
        seconds = {}
        for side in ("default", "keep"):
            done = subprocess.run([sys.executable, "-c", STEP, side], capture_output=True, text=True, check=True)
            seconds[side] = float(done.stdout)
        ratios.append(seconds["keep"] / seconds["default"])
        print(
            {side: f"{32 / value:.1f} images/s" for side, value in seconds.items()},
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio of step times, kept to default: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
