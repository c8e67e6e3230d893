"""The whole job on a small image set drawn by code: it shows that everything works, not that text helps."""

from __future__ import annotations

from pathlib import Path

from tes import console
from tes.config import load_config
from tes.demo_images import contact_sheet, draw_dataset
from tes.errors import RunError
from tes.verbs.train import train

ARMS = ("ce", "tes")
SEEDS = (0, 1, 2)
SHOTS = 2


def demo(out: Path) -> str:
    """Draw the images, train both arms from three seeds each, and return a table.

    Raises:
        RunError: `out` cannot be made.
    """
    images = out / "images"
    try:
        if not images.is_dir():
            console.note("drawing images")
            draw_dataset(images)
        sheet = out / "contact_sheet.png"
        contact_sheet(images, sheet)
    except OSError as problem:
        raise RunError(f"The demo's folder `{out}` cannot be written: {problem.strerror or problem}.") from None

    lines = [
        f"mean per class on the test split, {SHOTS} shots, {len(SEEDS)} seeds: mean (range)",
        "",
        f"{'arm':8}{'vision':>24}{'text':>24}{'both':>24}",
    ]
    for arm in ARMS:
        figures: dict[str, list[float]] = {}
        for seed in SEEDS:
            console.note(f"training `{arm}`, seed {seed}")
            flags = {
                "data.source": str(images),
                "data.shots": SHOTS,
                "objective": arm,
                "train": "head",
                "seed": seed,
                "out": str(out / "runs" / f"{arm}-{seed}"),
            }
            with console.quiet():
                run = train(load_config(flags=flags), overwrite=True)
            for head, metrics in run.metrics["test"].items():
                figures.setdefault(head, []).append(metrics["mean_per_class"])
        lines.append(
            f"{arm:8}" + "".join(f"{_mean_and_range(figures.get(head)):>24}" for head in ("vision", "text", "both"))
        )
    lines += [
        "",
        "These drawings show that everything works on this machine; they do not show that text helps.",
        "`ce` is plain fine-tuning and has no text head; `vision` is the head that is shipped.",
        f"images: {sheet}",
        f"runs:   {out / 'runs'}",
        "on your own photos, a folder with one sub-folder a class:",
        "  tes train PHOTOS --shots 5",
    ]
    return "\n".join(lines)


def _mean_and_range(values: list[float] | None) -> str:
    if not values:
        return "-"
    return f"{sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%})"
