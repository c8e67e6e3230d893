"""The model card of a run: what it is, how it was made, how well it does, how to use it. Markdown, offline."""

from __future__ import annotations

import re
from typing import Any

from tes.data.classes_file import ClassInfo
from tes.metrics import LOSSES, METRICS, ordered


def model_card(classes: list[ClassInfo], summary: dict[str, Any], seed: int, citation: str) -> str:
    """Return README.md of a run folder."""
    names = [plain(info.name) for info in classes]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    refit = summary["refit"]
    trained = trained_part(summary["train"])
    held = "`model.safetensors` holds backbone and head, `preprocess.json` and `classes.json` how to feed and read it,"
    if summary["default_head"] == "text":
        held = (
            "`model.safetensors` holds the backbone, `text_head.safetensors` the head that classifies,"
            " `preprocess.json` and `classes.json` how to feed and read them,"
        )
    chosen = "Hyper-parameters were not chosen on the test split."
    if summary["protocol"] == "paper":
        chosen = "**Test-selected**: trained on train and val, and chosen on the test split, as the authors' code does."
    lines = [
        f"# {plain(summary['data'])}: {len(classes)} classes",
        "",
        "An image classifier fine-tuned with [tes](https://arxiv.org/abs/2304.01489), arm"
        f" `{_code(summary['arm'])}` from the start `{_code(summary['start'])}`; backbone"
        f" `{_code(summary['backbone']['name'])}`, {trained} trained. It needs no text at inference; it answers with"
        f" its `{_code(summary['default_head'])}` head.",
        "",
        f"Classes: {shown}.",
        "",
        "## Figures",
        "",
        f"{summary['num_train']} training, {summary['num_val']} validation, {summary['num_test']} test images; seed"
        f" {seed}. The metric of this data: {METRICS[summary['primary_metric']]}. {chosen}",
    ]
    if refit != "none":
        lines.append(
            f"The shipped weights were trained once more on {_code(refit)}; the figures are those before this refit."
        )
    if summary.get("shipped") == "start":
        lines.append(
            "On val the steps did not beat the head that they started from: the figures are those of that head on the"
            " pre-trained backbone, which are shipped."
        )
    if "averaged" in summary:
        alpha = summary["averaged"]["alpha"]
        lines.append(f"These weights are {alpha:g} of the run's and {1 - alpha:g} of its start's, chosen on val.")
    shown = [name for name in ordered(summary["primary_metric"]) if name not in ("top5", "coarse_top1")]
    lines += ["", f"| split | head | {' | '.join(METRICS[name] for name in shown)} |", "|---" * (2 + len(shown)) + "|"]
    for split, heads in summary["metrics"].items():
        for head, figures in heads.items():
            cells = [f"{figures[name]:{'.3f' if name in LOSSES else '.1%'}}" for name in shown]
            lines.append(f"| {split} | {head} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Use",
        "",
        "```\ntes predict THIS_FOLDER photo.jpg\n```",
        "",
        held,
        "`config.yaml` all settings.",
    ]
    if citation:
        lines += ["", f"Method: {citation}."]
    return "\n".join(lines) + "\n"


def trained_part(train: str) -> str:
    """Return in words what `train` has trained."""
    num_last = train.removeprefix("last-")
    layers = "the last layer" if num_last == "1" else f"the last {num_last} layers"
    return {"head": "the head alone", "all": "all weights"}.get(train, f"{layers} and the head")


def _code(text: str) -> str:
    """Keep a word that stands between backticks from ending them."""
    return re.sub(r"[^\w@+.:/-]+", "", str(text))


def plain(text: str) -> str:
    """Keep names that a stranger chose from being read as Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|])", r"\\\1", " ".join(str(text).split()))
