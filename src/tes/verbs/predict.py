"""A finished run as a classifier of new images. It needs no text: only the backbone and the head that is shipped.

Nothing in the run folder is imported: a saved `package.module:factory` runs only when the caller repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from tes import console
from tes.config import BackboneConfig, ObjectiveConfig
from tes.data.images import SUFFIXES, UnreadableImageError, decode
from tes.engine.compute import Compute, resolve_device
from tes.engine.learner import Learner
from tes.engine.loader import eval_transform
from tes.engine.solve import LinearHead
from tes.errors import DataError, RunError, did_you_mean
from tes.files import read_json
from tes.models.backbone import Backbone, build_network, own_network
from tes.models.checkpoint import load_strictly, read_weights
from tes.models.image_settings import ImageSettings
from tes.objectives.base import ModelOutput, Objective
from tes.objectives.text_head import TextHead
from tes.run import Run

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image; `label` is "" and `reason` says why where it could not be read."""

    path: str
    label: str
    prob: float | None
    top5: tuple[tuple[str, float], ...]
    reason: str | None = None


class Classifier:
    """A trained model and its class names, ready for new images."""

    def __init__(self, learner: Learner, labels: Sequence[str]) -> None:
        self.learner, self.labels = learner, list(labels)
        self.transform = eval_transform(learner.backbone.images)

    @staticmethod
    def from_run(run: Run | str | Path, *, backbone: str | None = None, network: nn.Module | None = None) -> Classifier:
        """Load the model of a run folder.

        Args:
            run: A run or its folder.
            backbone: For a run with an own module: its `package.module:factory`, repeated.
            network: The module itself, likewise.

        Raises:
            RunError: The folder is damaged, or an own module was not repeated.
        """
        run = run if isinstance(run, Run) else Run.open(run)
        learner = load_learner(run, backbone=backbone, network=network, compute=recorded_compute(run))
        return Classifier(learner, [str(row["class"]) for row in run.classes])

    @torch.inference_mode()
    def probabilities(self, images: Iterable[Image.Image]) -> Tensor:
        """Return probabilities (B, C) of RGB images."""
        batch = torch.stack([self.transform(image.convert("RGB")) for image in images])
        learner = self.learner.eval()
        with learner.compute.autocast():
            features_BF = learner.backbone(learner.compute.images(batch))
        objective = learner.objective
        return objective.heads(learner.output(features_BF))[objective.default_head].softmax(dim=1).cpu()

    def predict(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """Yield a prediction per image file, in order; a file that cannot be read yields a reason instead."""
        paths = list(paths)
        with console.progress(len(paths), "predicting") as progress:
            for start in range(0, len(paths), BATCH_SIZE):
                part = paths[start : start + BATCH_SIZE]
                read = [_read(path) for path in part]
                images = [image for image in read if isinstance(image, Image.Image)]
                rows = iter(self.probabilities(images) if images else ())
                for path, image in zip(part, read):
                    if isinstance(image, Image.Image):
                        yield self._prediction(str(path), next(rows))
                    else:
                        yield Prediction(str(path), "", None, (), reason=image)
                progress.advance(len(part))

    def _prediction(self, path: str, row_C: Tensor) -> Prediction:
        values, indices = row_C.topk(min(5, len(self.labels)))
        top5 = tuple((self.labels[index], float(value)) for value, index in zip(values, indices.tolist()))
        return Prediction(path, top5[0][0], top5[0][1], top5)


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files named, and the images below the folders named, in order.

    Raises:
        DataError: A path does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
            )
            if not below:
                raise DataError(f"The folder `{path}` holds no images.")
            files += below
        elif path.exists():
            files.append(path)
        else:
            near = did_you_mean(path.name, [f.name for f in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise DataError(f"There is no image or folder `{path}`.{near}")
    return files


def recorded_compute(run: Run) -> Compute:
    """Return the arithmetic that the run was trained in where this machine has its device, else plain fp32."""
    device, _ = resolve_device("auto")
    recorded = run.settings
    if recorded.get("device") != device:
        return Compute(device, "fp32", "contiguous", 0)
    precision = "bf16" if recorded.get("precision") == "bf16" else "fp32"
    layout = "channels_last" if recorded.get("memory_format") == "channels_last" else "contiguous"
    return Compute(device, precision, layout, 0)


def load_learner(run: Run, *, backbone: str | None, network: nn.Module | None, compute: Compute) -> Learner:
    """Rebuild a run's network with its trained weights and, where it has one, its text head.

    Raises:
        RunError: The folder is damaged, or its backbone is an own module that was not repeated.
    """
    settings = run.settings
    try:
        recorded = BackboneConfig.model_validate(settings.get("backbone"))
    except ValidationError as problem:
        what = problem.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RunError(f"`{run.path / 'config.yaml'}` does not name a backbone that can be built: {what}.") from None
    name, kwargs = recorded.name, recorded.kwargs
    images = ImageSettings.from_dict(read_json(run.path / "preprocess.json", RunError))
    weights = _model_weights(run)
    if network is None:
        if ":" in name:
            if backbone is None:
                raise RunError(
                    f"The run's backbone is the own module `{name}`, which is not imported on a run folder's word; if"
                    f" you trust it, repeat it: --backbone {name}."
                )
            network = own_network(BackboneConfig(name=backbone, kwargs=kwargs))
        else:
            network = build_network(name, kwargs)
    prefix = "backbone."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    load_strictly(network, own, f"The model of `{run.path}`")
    model = Backbone(network, backbone or name, images, {})
    num_classes = len(run.classes)
    try:
        head = LinearHead(weights["head.weight"], weights["head.bias"])
    except KeyError as missing:
        raise RunError(f"The model of `{run.path}` has no {missing}.") from None
    if head.weight_CF.shape != (num_classes, model.num_features) or head.bias_C.shape != (num_classes,):
        raise RunError(
            f"The head in `{run.path}` is {tuple(head.weight_CF.shape)} + {tuple(head.bias_C.shape)}, but the run has"
            f" {num_classes} classes and the backbone {model.num_features} features."
        )
    if not (head.weight_CF.isfinite().all() and head.bias_C.isfinite().all()):
        raise RunError(f"The head in `{run.path}` is not finite; the file is damaged.")
    learner = Learner(model, head, _saved_heads(run, model.num_features, num_classes), compute)
    return compute.place(learner).eval()


def _model_weights(run: Run) -> dict[str, Tensor]:
    if "backbone.safetensors" in (run.summary.get("shared") or {}):  # a cell of a comparison
        return read_weights(run.file("backbone.safetensors")) | read_weights(run.path / "head.safetensors")
    return read_weights(run.path / "model.safetensors")


class _SavedHeads(Objective):
    """The heads of a finished run: nothing to train, so no objective is looked up on a run folder's word."""

    def __init__(self, text_head: TextHead | None, default_head: str) -> None:
        super().__init__(ObjectiveConfig(name="saved"))
        self.text_head = text_head
        self.default_head = default_head

    def heads(self, out: ModelOutput) -> dict[str, Tensor]:
        # Where the text head is shipped, the vision head is only what training started from.
        vision = {} if self.default_head == "text" else super().heads(out)
        text = {} if self.text_head is None else {"text": self.text_head(out.features_BF)}
        return vision | text


def _saved_heads(run: Run, num_features: int, num_classes: int) -> _SavedHeads:
    path = run.file("text_head.safetensors")
    default_head = run.summary.get("default_head", "vision")
    if default_head not in ("vision", "text"):
        raise RunError(f"`{run.path / 'run.json'}` ships the head `{default_head}`; it can be `vision` or `text`.")
    if not path.is_file():
        if default_head == "text":
            raise RunError(f"`{run.path}` ships its text head, but there is no `{path}`.")
        return _SavedHeads(None, default_head)
    tensors = read_weights(path)
    try:
        head = TextHead.from_tensors(tensors, num_features)
    except (KeyError, RuntimeError, ValueError, IndexError) as problem:
        raise RunError(f"`{path}` does not hold a text head: {' '.join(str(problem).split())[:200]}.") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RunError(f"`{path}` is not finite; the file is damaged.")
    if len(head.class_text_CD) != num_classes:
        raise RunError(f"`{path}` has {len(head.class_text_CD)} text rows; the run has {num_classes} classes.")
    return _SavedHeads(head, default_head)


def _read(path: str | Path) -> Image.Image | str:
    try:
        return decode(Path(path).read_bytes())
    except UnreadableImageError as problem:
        return str(problem)
    except OSError as problem:
        return problem.strerror or str(problem)
