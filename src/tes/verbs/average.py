"""A run averaged with its own start: θ_α = (1-α) θ0 + α θ of backbone and head, α chosen on val.

Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo-Lopes, Hajishirzi, Farhadi, Namkoong and Schmidt: Robust
fine-tuning of zero-shot models (WiSE-FT). CVPR 2022. θ0 is the pre-trained backbone with the head that training began
with. The run itself, α = 1, is kept unless another α beats it on val by more than one standard error, in NLL after a
temperature of its own: averaged weights are also less sure, and by the plain NLL an α would be chosen for that, at the
cost of accuracy, which `tes calibrate` has for nothing (LOG.md, 2026-11-25).

Where batch norms were trained, averaged weights have activations whose statistics neither end has: strictly between
the ends they are re-estimated, as `torch.optim.swa_utils.update_bn` does, on training images in random order, prepared
as at test time, since it is test images that they will normalise. Where they were frozen (the default) the statistics
are constants that the weights were trained around, equal at both ends, and they stay: to re-estimate them cost 8 points
right beside the run itself (LOG.md, 2026-11-25).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from tes import console, run_writer
from tes.calibration import best_temperature, tempered
from tes.card import model_card
from tes.config import OptimConfig
from tes.data.dataset import Dataset
from tes.engine.fit import Fitted
from tes.engine.learner import Learner
from tes.engine.loader import eval_batches
from tes.engine.memory import ImageMemory
from tes.engine.scoring import predict
from tes.engine.solve import Solution
from tes.errors import RunError, counted
from tes.files import append_jsonl, read_json, sha256_file, user_path, write_atomic, write_json
from tes.metrics import METRICS, evaluate_split
from tes.mistakes import worth_showing
from tes.predictions import Predictions
from tes.reopen import Reopened, reopen, section
from tes.run import Run, claim, refuse_out_among_images
from tes.search import choose

ALPHAS = (1.0, *(round(0.1 * step, 1) for step in range(10)))
"""The run itself first: it is what is kept where nothing is better."""
MAX_NORM_IMAGES = 2048
"""Training images that batch-norm statistics are estimated on: more move them by less than one percent."""
OF_THE_RUN_ALONE = frozenset(
    {"shared", "against", "trials", "selected_trial", "averaged", "files", "shipped", "start_fallback"}
)
"""What run.json says of the run's own weights, and does not hold for averaged ones."""
MODELS = ("model.safetensors", "head.safetensors")
CITATION = "Wortsman et al.: Robust fine-tuning of zero-shot models (WiSE-FT). CVPR 2022"


def average(
    run: Run | str | Path,
    *,
    out: str | None = None,
    overwrite: bool = False,
    data_source: str | None = None,
    data_root: str | None = None,
    backbone: str | None = None,
    checkpoint: str | None = None,
    network: nn.Module | None = None,
) -> Run:
    """Average a run with its start, and return the new run, a folder like any other.

    Args:
        run: A run or its folder.
        out: The new folder; None: `runs/<data>-<arm>-averaged-<n>`.
        overwrite: Replace the run that stands in `out`.
        data_source: Where the images are: a run folder's word is not enough to open them.
        data_root: Where tasks' data sets are.
        backbone: Its name, repeated, where it is an own module or has its weights from the Hub.
        checkpoint: Where the pre-trained weights are, if they came from a file; likewise.
        network: An own module itself, pre-trained.

    Raises:
        TesError: A sentence about the run, its images or its backbone; nothing is left half-written.
    """
    began = time.monotonic()
    run = run if isinstance(run, Run) else Run.open(run)
    _refuse(run)
    where = {
        "data_source": data_source,
        "data_root": data_root,
        "backbone": backbone,
        "checkpoint": checkpoint,
        "network": network,
    }
    it = reopen(run, **where)
    start, end = _weights(it)
    if not start:
        raise RunError(f"`{run.path}` ended where it started, with its start's solution: there is nothing to average.")
    settings = _settings(run, data_source, data_root, checkpoint)
    refuse_out_among_images(user_path(out or "runs"), user_path(settings["data"]["source"]))
    if out is not None and user_path(out).resolve() == run.path.resolve():
        raise RunError(f"`{out}` is the run that is averaged, and stays; choose another --out.")
    with claim(out, f"{it.dataset.source.name}-{run.summary['arm']}-averaged", overwrite) as claimed:
        _average(it, start, end, claimed.path, settings)
        append_jsonl(claimed.path / "timing.jsonl", {"seconds": round(time.monotonic() - began, 3)})
    return Run.open(claimed.path)


def render(run: Run) -> str:
    """Return the course over α on val as a person reads it, and what was chosen."""
    averaged = run.summary["averaged"]
    metric, num_val = run.primary_metric, run.summary["num_val"]
    lines = [f"{'α':>4}{'NLL':>8}{'calibrated':>12}{METRICS[metric]:>16}   on {counted(num_val, 'validation image')}"]
    for row in averaged["val"]:
        mark = "  <" if row["alpha"] == averaged["alpha"] else ""
        lines.append(f"{row['alpha']:4.1f}{row['nll']:8.3f}{row['calibrated_nll']:12.3f}{row[metric]:16.1%}{mark}")
    if averaged["alpha"] == 1:
        lines.append("α = 1, the run itself: no other is better by more than one standard error")
    if averaged["num_norm_images"]:
        lines.append(f"batch norms between the ends: re-estimated on {averaged['num_norm_images']} training images")
    elif run.summary["train"] != "head":
        lines.append("batch norms, if any, were frozen in training and keep their statistics")
    return "\n".join(lines)


def _refuse(run: Run) -> None:
    summary = run.summary
    wanted = ("arm", "start", "train", "refit", "data", "num_train", "num_val", "num_test", "backbone", "default_head")
    if missing := [key for key in wanted if key not in summary]:
        raise RunError(f"`{run.path / 'run.json'}` is damaged: it has no `{missing[0]}`.")
    if summary["default_head"] == "text":
        raise RunError(f"`{run.path}` answers with its text head, whose start it does not keep: it cannot be averaged.")
    if not summary["num_train"]:
        raise RunError(f"`{run.path}` was made from 0 shots: it is its own start, with nothing to average.")
    if not summary["num_val"]:
        raise RunError(f"`{run.path}` has no validation image to choose α by, and test is not for choosing.")
    if summary["refit"] != "none":
        raise RunError(
            f"`{run.path}` was trained once more on {summary['refit']}, so that val can no longer choose α; train it"
            " with --refit none."
        )


def _weights(it: Reopened) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return θ0 of what training has moved, and the learner's whole state with θ in it; by the learner's names."""
    head = it.start_head
    start = {"head.weight": head.weight_CF, "head.bias": head.bias_C}
    if it.moved:
        network = it.pretrained.network.state_dict()
        start |= {f"backbone.network.{name}": value for name, value in network.items() if value.is_floating_point()}
    end = {name: value.detach().cpu().clone() for name, value in it.learner.state_dict().items()}
    start = {name: value.detach().cpu() for name, value in start.items()}
    return {name: value for name, value in start.items() if not torch.equal(value, end[name])}, end


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    if alpha == 1:
        return dict(end)
    return {name: (1 - alpha) * start[name] + alpha * value if name in start else value for name, value in end.items()}


def reestimate_norms(learner: Learner, dataset: Dataset, indices: np.ndarray) -> int:
    """Set every batch norm's statistics to the mean of those of batches; return how many images were used.

    The text head's is one of them: it reads the same features.
    """
    learner.train()  # all but layers that were not trained: their norms are the same at both ends
    norms = [
        module
        for module in learner.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.training
    ]
    if not norms:
        return 0
    # In the order of the data set a batch would hold one class, and lack the spread between classes.
    shuffled = np.random.default_rng(0).permutation(indices)[:MAX_NORM_IMAGES]
    learner.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in eval_batches(dataset, shuffled, learner.backbone.images, learner.compute):
            with learner.compute.autocast():
                features_BF = learner.backbone(learner.compute.images(batch.images_B3HW))
            learner.objective.heads(learner.output(features_BF))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    learner.eval()
    return len(shuffled)


def _average(
    it: Reopened, start: Mapping[str, Tensor], end: Mapping[str, Tensor], folder: Path, settings: dict[str, Any]
) -> None:
    learner, dataset = it.learner, it.dataset
    frozen = None if it.moved else it.features
    estimates_norms = it.moved and section(it.run, "optim", OptimConfig).freeze_norms is False
    num_norm_images = 0

    def put(alpha: float) -> None:
        nonlocal num_norm_images
        learner.load_state_dict(_between(start, end, alpha))
        if estimates_norms and 0 < alpha < 1:
            num_norm_images = reestimate_norms(learner, dataset, it.train_indices)

    val, memory = dataset.indices("val"), ImageMemory()
    said: list[Predictions] = []
    with console.progress(len(ALPHAS), "averaging", "weights") as progress:
        for alpha in ALPHAS:
            put(alpha)
            said.append(predict(learner, dataset, val, frozen, memory))
            progress.advance(1)
    chosen = choose([calibrated_losses(predictions) for predictions in said])
    put(ALPHAS[chosen])
    curve = [_row(alpha, predictions) for alpha, predictions in sorted(zip(ALPHAS, said), key=lambda pair: pair[0])]
    averaged = {
        "alpha": ALPHAS[chosen],
        "val": curve,
        "num_norm_images": num_norm_images,
        "run": {name: sha256_file(it.run.path / name) for name in MODELS if (it.run.path / name).is_file()},
    }
    _write(it, folder, settings, averaged)


def _row(alpha: float, predictions: Predictions) -> dict[str, float]:
    figures = evaluate_split(predictions)["vision"]
    return {
        "alpha": alpha,
        "nll": figures["nll"],
        "calibrated_nll": float(calibrated_losses(predictions).mean()),
        "mean_per_class": figures["mean_per_class"],
        "top1": figures["top1"],
    }


def calibrated_losses(predictions: Predictions) -> np.ndarray:
    """Return -log p(true class), (n,), of the vision head at the temperature that suits these images best."""
    log_p_NC = predictions.log_probabilities("vision")
    temperature = best_temperature(log_p_NC, predictions.labels)  # for a rival that is always right: as sure as can be
    return -np.take_along_axis(tempered(log_p_NC, temperature), predictions.labels[:, None], axis=1)[:, 0]


def _settings(run: Run, data_source: str | None, data_root: str | None, checkpoint: str | None) -> dict[str, Any]:
    """Return the run's settings, with its images and weights where they are now."""
    settings = copy.deepcopy(run.settings)
    if data_source is not None:
        settings["data"]["source"], settings["data"]["root"] = data_source, data_root
    if checkpoint is not None:
        settings["backbone"]["checkpoint"] = checkpoint
    return settings


def _write(it: Reopened, folder: Path, settings: dict[str, Any], averaged: dict[str, Any]) -> None:
    """Write a whole run folder of the learner as it stands; test is scored here, once."""
    run, learner, dataset = it.run, it.learner, it.dataset
    write_atomic(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_json(folder / "env.json", run_writer.environment())
    write_json(folder / "preprocess.json", learner.backbone.images.to_dict())
    write_json(folder / "classes.json", read_json(run.path / "classes.json", RunError))
    write_atomic(folder / "splits.csv", run.file("splits.csv").read_bytes())
    said: dict[str, Predictions] = {}
    if (run.path / "predictions" / "train.npz").is_file():  # of the start, which is the same
        said["train"] = run.predictions("train")
        run_writer.write_out_of_fold(folder, said["train"])
    for row in averaged["val"]:
        append_jsonl(folder / "metrics.jsonl", {"split": "val", **row})
    metrics = {}
    for split in ("val", "test"):
        if len(indices := dataset.indices(split)):
            said[split] = predict(learner, dataset, indices, None if it.moved else it.features)
            metrics[split] = run_writer.write_predictions(folder, split, said[split], dataset)
            append_jsonl(
                folder / "metrics.jsonl", {"split": split, "alpha": averaged["alpha"], "heads": metrics[split]}
            )
    run_writer.write_thumbnails(folder / "thumbnails", dataset, worth_showing(said, "vision"))
    run_writer.write_model(folder, Fitted(learner, Solution(it.start_head)), it.text, None)
    kept = {key: value for key, value in run.summary.items() if key not in OF_THE_RUN_ALONE}
    summary = kept | {"metrics": metrics, "averaged": averaged}
    seed = int(settings.get("seed") or 0)
    write_atomic(folder / "README.md", model_card(dataset.classes, summary, seed, CITATION))
    run_writer.write_summary(folder, summary)
