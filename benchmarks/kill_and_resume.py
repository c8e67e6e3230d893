"""Kill a real training at random moments, go on with `--resume`, and hold the end against the uninterrupted run's.

    uv run python benchmarks/kill_and_resume.py --kills 30

Every training is `tes train` in a process of its own (forked from one that has imported PyTorch, which takes longer
than the training). Its end comes by SIGKILL, by SIGTERM, or by SIGKILL while a state is being written; a training that
has gone on may be killed again. Compared are the bytes of all files but those that name the clock, the command or the
run's folder. Exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
OPTIONS = {
    "tes": "--objective tes --start probe --workers 2 --set optim.ema=0.95 --set optim.accumulate=2"
    " --set augment.mixup=0.2 --set augment.cutmix=1 --set optim.layer_decay=0.8",
    "bi_tuning": "--objective bi_tuning --set optim.ema=0.95 --set optim.accumulate=2 --set optim.name=sgd",
}
COMMON = (
    "--backbone resnet18 --size 32 --train all --batch-size 8 --set optim.num_steps={steps}"
    " --set optim.freeze_norms=false --set checkpoint.every_minutes=0.001"
)
KWARGS = {"channels": [4, 8, 8, 16], "stem_width": 4, "drop_rate": 0.1, "drop_path_rate": 0.1}
ENDS = ("SIGKILL", "SIGTERM", "SIGKILL in a checkpoint")
FREE = {"config.yaml", "env.json", "timing.jsonl"}
"""Files that may differ: they name the run's folder, the command, the clock."""


def main() -> None:
    """Kill and go on until there were enough ends, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    import_all()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs(Path())
        whole, seconds = {}, {}
        for name in OPTIONS:
            began = time.monotonic()
            finish(start(name, Path(f"{name}-whole"), given.steps))
            whole[name], seconds[name] = content(Path(f"{name}-whole")), time.monotonic() - began
        ends: Counter[str] = Counter()
        trials = wrong = 0
        while ends.total() < given.kills:
            name = tuple(OPTIONS)[trials % len(OPTIONS)]
            run = Path(f"{name}-{trials}")
            trials += 1
            goes_on = True
            while goes_on and ends.total() < given.kills:
                end = ENDS[ends.total() % len(ENDS)]
                code = kill(start(name, run, given.steps), run, end, draw.uniform(0, seconds[name]))
                if code == 0:  # it was finished first
                    break
                assert code in ((75, -signal.SIGTERM) if end == "SIGTERM" else (-signal.SIGKILL,)), (code, log())
                ends[end] += 1
                goes_on = draw.random() < 0.5
            finish(start(name, run, given.steps))
            found = content(run)
            names = sorted(whole[name].keys() | found.keys())
            differing = [file for file in names if whole[name].get(file) != found.get(file)]
            wrong += bool(differing)
            print(f"{run}: {'differs in ' + ', '.join(differing) if differing else 'equal'}", flush=True)
    shown = ", ".join(f"{count} by {end}" for end, count in ends.items())
    print(f"{ends.total()} ends ({shown}) of {trials} trainings; {trials - wrong} of {trials} ended with equal bytes")
    sys.exit(1 if wrong else 0)


def import_all() -> None:
    """Import what a training imports, so that a forked process need not."""
    import timm
    import torchvision.transforms.v2
    import transformers

    import tes.cli
    import tes.verbs.train

    assert timm and torchvision and transformers and tes


def make_inputs(folder: Path) -> None:
    """Write three classes of images, weights of a tiny network, and text rows."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    draw = np.random.default_rng(0)
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    for name, colour in colours.items():
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(15):
            pixels = (np.array(colour) + draw.integers(-30, 30, size=(40, 48, 3))).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10, **KWARGS)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "w.safetensors")
    rows = draw.normal(size=(3, 6)).astype("float32")
    np.savez(folder / "rows.npz", names=np.array(list(colours)), embeddings=rows)


def start(name: str, run: Path, steps: int) -> int:
    """Start a training, or go on with it, and return its process."""
    kwargs = "{" + ", ".join(f"{key}: {value}" for key, value in KWARGS.items()) + "}"
    command = ["tes", "train", "photos", "--checkpoint", "w.safetensors", "--text", "file:rows.npz", "--out", str(run)]
    command += [*COMMON.format(steps=steps).split(), *OPTIONS[name].split(), "--set", f"backbone.kwargs={kwargs}"]
    process = os.fork()
    if process:
        return process
    from tes.cli import main as command_line

    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [*command, "--resume"]
    code: object = 1
    try:
        command_line()
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def finish(process: int) -> None:
    """Wait for a training that nobody ends."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 0, (code, log())


def log() -> str:
    """Return what the last training said."""
    return Path("log").read_text()


def kill(process: int, run: Path, end: str, after_seconds: float) -> int:
    """End a process after a while, unless it ends before; return its exit code, or minus the signal that ended it."""
    until = time.monotonic() + after_seconds
    while time.monotonic() < until or (end == "SIGKILL in a checkpoint" and not any(run.glob("state/.*"))):
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGTERM if end == "SIGTERM" else signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(run: Path) -> dict[str, bytes]:
    """Return the files of a run that do not depend on the clock or on where it is."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in FREE]
    found = {str(path.relative_to(run)): path.read_bytes() for path in files}
    summary = json.loads(found["run.json"])
    summary["files"] = {name: digest for name, digest in summary["files"].items() if name not in FREE}
    return found | {"run.json": json.dumps(summary).encode()}


if __name__ == "__main__":
    main()
