"""A finished run as a classifier of new images. It needs no text: only the backbone and the head that is shipped.

Nothing in the run folder is imported: a saved `package.module:factory` runs only when the caller repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from tes import console
from tes.calibration import Calibration
from tes.data.images import SUFFIXES, UnreadableImageError, decode, upright_rgb
from tes.engine.learner import Learner
from tes.engine.loader import eval_transform
from tes.errors import DataError, did_you_mean
from tes.reopen import load_learner, recorded_compute
from tes.run import Run

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image; `label` is "" and `reason` says why where it could not be read.

    `label` and those of `top5` are as the data has them, `name` is what people read.
    """

    path: str
    label: str
    prob: float | None
    top5: tuple[tuple[str, float], ...]
    reason: str | None = None
    name: str = ""


class Classifier:
    """A trained model and its class names, ready for new images."""

    def __init__(
        self, learner: Learner, labels: Sequence[str], temperature: float = 1.0, names: Sequence[str] | None = None
    ) -> None:
        self.learner, self.labels, self.temperature = learner, list(labels), temperature
        self.names = self.labels if names is None else list(names)
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
        calibration = Calibration.load(run.path / "calibration.json")
        temperature = 1.0 if calibration is None else calibration.temperature.get(learner.objective.default_head, 1.0)
        labels, names = ([str(row.get(key, row["class"])) for row in run.classes] for key in ("class", "name"))
        return Classifier(learner, labels, temperature, names)

    @torch.inference_mode()
    def probabilities(self, images: Iterable[Image.Image]) -> Tensor:
        """Return probabilities (B, C) of images in memory, calibrated where `tes calibrate` was run.

        They are made upright RGB as files are: turned as their EXIF says, on white where transparent.
        """
        return self._probabilities(torch.stack([self.transform(upright_rgb(image)) for image in images]))

    def _probabilities(self, batch: Tensor) -> Tensor:
        learner = self.learner.eval()
        with learner.compute.autocast():
            features_BF = learner.backbone(learner.compute.images(batch))
        objective = learner.objective
        logits_BC = objective.heads(learner.output(features_BF))[objective.default_head]
        return (logits_BC / self.temperature).softmax(dim=1).cpu()

    def predict(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """Yield a prediction per image file, in order; a file that cannot be read yields a reason instead."""
        paths = list(paths)
        with console.progress(len(paths), "predicting") as progress, ThreadPoolExecutor() as threads:
            for start in range(0, len(paths), BATCH_SIZE):
                part = paths[start : start + BATCH_SIZE]
                read = list(threads.map(self._read, part))
                images = [image for image in read if isinstance(image, Tensor)]
                with torch.inference_mode():
                    rows = iter(self._probabilities(torch.stack(images)) if images else ())
                for path, image in zip(part, read):
                    if isinstance(image, Tensor):
                        yield self._prediction(str(path), next(rows))
                    else:
                        yield Prediction(str(path), "", None, (), reason=image)
                progress.advance(len(part))

    def _read(self, path: str | Path) -> Tensor | str:
        """Return a file as the network sees it, which is small whatever the photo's size, or why it cannot be read."""
        try:
            return self.transform(decode(Path(path).read_bytes()))
        except UnreadableImageError as problem:
            return str(problem)
        except OSError as problem:
            return problem.strerror or str(problem)

    def _prediction(self, path: str, row_C: Tensor) -> Prediction:
        values, indices = row_C.topk(min(5, len(self.labels)))
        top5 = tuple((self.labels[index], float(value)) for value, index in zip(values, indices.tolist()))
        return Prediction(path, top5[0][0], top5[0][1], top5, name=self.names[int(indices[0])])


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
