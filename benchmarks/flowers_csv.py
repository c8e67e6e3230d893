"""Write a CSV of Flowers-102 with its official splits, from the folder that holds `jpg/` and the official `.mat` files.

    python benchmarks/flowers_csv.py FLOWERS_FOLDER flowers.csv

Class names come from `cat_to_name.json` beside them.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from scipy.io import loadmat

SPLITS = {"trnid": "train", "valid": "val", "tstid": "test"}


def main() -> None:
    folder, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    ids, labels = loadmat(folder / "setid.mat"), loadmat(folder / "imagelabels.mat")["labels"][0]
    names = json.loads((folder / "cat_to_name.json").read_text())
    split_of = {int(number): split for key, split in SPLITS.items() for number in ids[key][0]}
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "label", "split"])
        for number, split in sorted(split_of.items()):
            table.writerow([folder / "jpg" / f"image_{number:05}.jpg", names[str(labels[number - 1])], split])


if __name__ == "__main__":
    main()
