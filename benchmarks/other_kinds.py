"""Write two data sets that no default was designed on and that are no photographs: emojis, and handwritten digits.

    npm install emoji-datasource-google emoji-datasource-twitter
    python benchmarks/other_kinds.py node_modules OUT

OUT/emoji.csv: two designs of each emoji (one `group`: they never cross a split), labelled with the Unicode subcategory,
where that has at least 16 emojis. OUT/digits.csv: scikit-learn's 1,797 digits of 8 x 8 pixels, written as PNG, labelled
zero to nine. Both without splits: `tes` carves them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DESIGNS = ("google", "twitter")
MIN_EMOJIS = 16
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    modules, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_emojis(modules, out / "emoji.csv")
    write_digits(out)


def write_emojis(modules: Path, table: Path) -> None:
    entries = json.loads((modules / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8"))
    entries = [entry for entry in entries if all(entry[f"has_img_{design}"] for design in DESIGNS)]
    count = Counter(entry["subcategory"] for entry in entries)
    rows = [
        (modules / f"emoji-datasource-{design}" / "img" / design / "64" / entry["image"], entry["subcategory"], number)
        for number, entry in enumerate(entries)
        for design in DESIGNS
        if count[entry["subcategory"]] >= MIN_EMOJIS
    ]
    write_table(table, ("path", "label", "group"), rows)


def write_digits(out: Path) -> None:
    folder, digits = out / "digits", load_digits()
    folder.mkdir(exist_ok=True)
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / f"{number:04}.png"
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BILINEAR).save(path)
        rows.append((path, DIGITS[label]))
    write_table(out / "digits.csv", ("path", "label"), rows)


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
    print(f"{path}: {len(rows)} images of {len({row[1] for row in rows})} classes")


if __name__ == "__main__":
    main()
