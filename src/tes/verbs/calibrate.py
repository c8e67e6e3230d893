"""Temperatures of a finished run, and the weight of its text head, from its saved predictions on val."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tes.calibration import Calibration
from tes.errors import RunError, counted
from tes.metrics import METRICS, evaluate_split
from tes.run import Run


def calibrate(run: Run | str | Path) -> dict[str, Any]:
    """Fit a run's calibration to val, and write calibration.json into its folder.

    From then on `tes predict` gives calibrated probabilities; what it predicts stays.

    Returns:
        {"num_samples", "metric" (the data's), "temperature", "text_weight", "notes",
        "splits": {split: {"before": {head: metrics}, "after"}}}.
        Test is reported only, where the run has predictions for it.

    Raises:
        RunError: The run has no validation image, or its folder is damaged.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    splits = [split for split in ("val", "test") if (run.path / "predictions" / f"{split}.npz").is_file()]
    if "val" not in splits or run.summary.get("protocol") == "paper":
        raise RunError(
            f"`{run.path}` has no validation image to fit a temperature to, and test is not for choosing; train with"
            " more images per class than --shots takes."
        )
    fitted = Calibration.fit(run.predictions("val"))
    said = {split: run.predictions(split) for split in splits}
    result = {
        "num_samples": fitted.num_samples,
        "metric": run.primary_metric,
        "temperature": dict(fitted.temperature),
        "text_weight": fitted.text_weight,
        "notes": dict(fitted.notes),
        "splits": {
            split: {"before": evaluate_split(predictions), "after": fitted.evaluate(predictions)}
            for split, predictions in said.items()
        },
    }
    fitted.save(run.path / "calibration.json")
    return result


def render(result: dict[str, Any]) -> str:
    """Return the result as a person reads it."""
    metric = result["metric"]
    lines = [f"fitted to {counted(result['num_samples'], 'validation image')}"]
    if result["num_samples"] < FEW:
        lines[0] += f": fewer than {FEW}, so a temperature is a rough guess"
    for head, temperature in result["temperature"].items():
        lines.append(f"T of {head}: " + result["notes"].get(head, f"{temperature:.3f}"))
    if result["text_weight"] is not None:
        lines.append(f"ensemble: {result['text_weight']:.2f} text + {1 - result['text_weight']:.2f} vision")
    lines += [
        "",
        f"{'split':6}{'head':10}{'NLL':>8}{'after':>8}{'ECE':>8}{'after':>8}{METRICS[metric]:>16}{'after':>8}",
    ]
    for split, scores in result["splits"].items():
        for head, after in scores["after"].items():
            before = scores["before"].get(head)
            cells = [f"{split:6}{head:10}"]
            for name, width, shape in (("nll", 8, ".3f"), ("ece", 8, ".3f"), (metric, 16, ".1%")):
                cells.append(f"{'-' if before is None else format(before[name], shape):>{width}}")
                cells.append(f"{format(after[name], shape):>8}")
            lines.append("".join(cells))
    return "\n".join(lines)


FEW = 100
"""Validation images below which a temperature's error is a tenth and more."""
