"""Write a CSV of a data set, with its splits, in which a share of the training labels is wrong.

    python benchmarks/noisy_labels.py DATA OUT.csv --share 0.05 --seed 0

A wrong label is another class's, drawn uniformly; val and test are left alone, and no class loses its last training
image. The column `true_label` says what was there before: `tes` ignores it (and says so), and a row was changed where
it differs from `label`. Paths are absolute.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from tes import data
from tes.config import DataConfig
from tes.data import Dataset, Sample
from tes.errors import DataError
from tes.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dataset = data.open_dataset(DataConfig(source=arguments.data))
    labels = plant(dataset, arguments.share, arguments.seed)
    write(arguments.out, dataset, labels)
    changed = int((labels != dataset.labels).sum())
    print(f"{arguments.out}: {changed} of {len(dataset.indices('train'))} training labels are wrong")


def plant(dataset: Dataset, share: float, seed: int) -> np.ndarray:
    """Return the labels (n,), int64, of which `share` of the training images' are another class's."""
    draw = np.random.default_rng(seed)
    labels, train = dataset.labels.copy(), dataset.indices("train")
    left = np.bincount(labels[train], minlength=dataset.num_classes)
    wanted = round(share * len(train))
    for index in draw.permutation(train):
        if wanted and left[labels[index]] > 1:
            left[labels[index]] -= 1
            others = np.delete(np.arange(dataset.num_classes), labels[index])
            labels[index] = draw.choice(others)
            wanted -= 1
    return labels


def write(path: Path, dataset: Dataset, labels: np.ndarray) -> None:
    """Write the table: `path,label,split,group,true_label`.

    Raises:
        DataError: The images are not files.
    """
    names = [info.label for info in dataset.classes]
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["path", "label", "split", "group", "true_label"])
    for number, name in enumerate(dataset.paths):
        true = names[dataset.labels[number]]
        file = dataset.source.locate(Sample(name, true))
        if file is None:
            raise DataError(f"The images of `{dataset.name}` are not files, so that no CSV can name them.")
        table.writerow(
            [file.absolute(), names[labels[number]], dataset.splits[number], dataset.groups[number] or "", true]
        )
    write_atomic(path, out.getvalue())


if __name__ == "__main__":
    main()
