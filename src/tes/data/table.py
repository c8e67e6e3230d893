"""A CSV or TSV file with the columns `path,label[,split][,group]`; paths are relative to the file."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tes.data.names import match_key
from tes.data.source import SPLIT_WORDS, LocalSource, Sample, no_such_path
from tes.errors import DataError, counted, did_you_mean, listing
from tes.files import user_path

_COLUMNS = ("path", "label", "split", "group")
_SYNONYMS = {
    "path": {"image", "images", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img", "name"},
    "label": {"class", "class_name", "classname", "category", "target", "labels", "species", "y"},
}


class TableSource(LocalSource):
    """Images that a table lists. Files that are missing count as unreadable images, not as an error here.

    Args:
        ref: The table, UTF-8 with or without a byte order mark; `.tsv` is separated by tabs, all else by commas, or
            by semicolons where the first line has these alone.

    Raises:
        DataError: The table cannot be read, lacks a column or a cell, or contradicts itself.
    """

    def __init__(self, ref: str | Path) -> None:
        path = user_path(ref)
        if not path.is_file():
            raise no_such_path(path, "file")
        super().__init__(path.parent, name=path.stem)
        self._table = path
        self.notes: list[str] = []
        rows = _read_rows(path)
        _, header = next(rows, (1, []))
        columns = self._columns(header)
        samples: dict[str, Sample] = {}
        lines: list[tuple[int, Sample]] = []
        repeated = 0
        for line, cells in rows:
            if len(cells) != len(header):
                raise DataError(
                    f"`{path}`, line {line}, has {counted(len(cells), 'cell')} where the first line has {len(header)};"
                    ' put a cell that holds a comma in quotes, as in "Ford F-150, 2012".'
                )
            sample = self._sample(line, cells, columns)
            lines.append((line, sample))
            known = samples.setdefault(sample.path, sample)
            if known is not sample:
                repeated += 1
                self._check_repeated(line, known, sample)
        if not samples:
            raise DataError(f"`{path}` lists no images.")
        _check_one_label_a_cell(path, lines)
        self._check_splits(lines)
        self.samples = sorted(samples.values(), key=lambda sample: sample.path)
        self._note_other_folders()
        if repeated:
            self.notes.append(f"Ignored {counted(repeated, 'repeated row')} of `{path.name}`.")

    def _columns(self, header: Sequence[str]) -> dict[str, int]:
        names = [name.strip().lower() for name in header]
        for needed in ("path", "label"):
            if needed not in names:
                likely = next((name for name in names if name in _SYNONYMS[needed]), None)
                hint = f" Is it `{likely}`? Rename that." if likely else did_you_mean(needed, names)
                raise DataError(
                    f"`{self._table}` has no column `{needed}`.{hint} Its first line must name"
                    f" the columns `path` and `label` (and, if you like, `split` and `group`); it reads:"
                    f" {listing(header) or 'nothing'}."
                )
        for name in _COLUMNS:
            if names.count(name) > 1:
                raise DataError(f"`{self._table}` has {names.count(name)} columns called `{name}`; keep one of them.")
        if unknown := [name for name in names if name and name not in _COLUMNS]:
            self.notes.append(f"Ignored these columns of `{self._table.name}`: {listing(unknown)}.")
        return {name: names.index(name) for name in _COLUMNS if name in names}

    def _sample(self, line: int, cells: list[str], columns: dict[str, int]) -> Sample:
        values = {name: cells[column].strip() for name, column in columns.items()}
        for name in ("path", "label"):
            if not values[name]:
                raise DataError(f"`{self._table}`, line {line}: the cell `{name}` is empty; fill it or drop the row.")
        split = values.get("split") or None
        if split is not None and split.lower() not in SPLIT_WORDS:
            raise DataError(
                f"`{self._table}`, line {line}: `{split}` is no split; write train, val (validation, valid) or test."
            )
        return Sample(
            path=self._relative(values["path"]),
            label=values["label"],
            split=SPLIT_WORDS[split.lower()] if split else None,
            group=values.get("group") or None,
        )

    def _relative(self, path: str) -> str:
        path = posixpath.normpath(path.replace("\\", "/"))
        root = self.root.absolute()
        return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path

    def _note_other_folders(self) -> None:
        """Say where labels disagree with the class folders that the images lie in, if the folders are the classes."""
        keys = {label: match_key(label) for label in {sample.label for sample in self.samples}}
        folders = {sample.path: posixpath.basename(posixpath.dirname(sample.path)) for sample in self.samples}
        of_folder = {folder: match_key(folder) for folder in set(folders.values())}
        named = [sample for sample in self.samples if of_folder[folders[sample.path]] in keys.values()]
        other = [sample for sample in named if of_folder[folders[sample.path]] != keys[sample.label]]
        if other and len(other) < len(named) / 2:
            shown = listing([f"{sample.path} is `{sample.label}`" for sample in other], 3)
            self.notes.append(
                f"{counted(len(other), 'label')} of `{self._table.name}` disagree with the class folder that the image"
                f" lies in ({shown}): the table counts."
            )

    def _check_repeated(self, line: int, known: Sample, sample: Sample) -> None:
        for name in ("label", "split", "group"):
            first, second = getattr(known, name), getattr(sample, name)
            if first != second:
                raise DataError(
                    f"`{self._table}`, line {line}: `{sample.path}` is listed twice, with the {name} `{first}` and"
                    f" with `{second}`; keep one of the rows."
                )

    def _check_splits(self, lines: list[tuple[int, Sample]]) -> None:
        splits = {sample.split for _, sample in lines}
        if splits == {None}:
            return
        if None in splits:
            line = next(line for line, sample in lines if sample.split is None)
            raise DataError(
                f"`{self._table}`, line {line}: the cell `split` is empty; fill it in every row, or drop the column."
            )
        if "train" not in splits:
            raise DataError(f"`{self._table}` has rows for {listing(sorted(splits))} but none for train; add them.")


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every row that is not blank, the header first."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"`{path}` is not UTF-8 text; save it again as CSV with the encoding UTF-8.") from None
    except OSError as problem:
        raise DataError(f"`{path}` cannot be read: {problem.strerror or problem}.") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(path, text), strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as problem:
        raise DataError(f"`{path}`, line {reader.line_num}, is not valid CSV: {problem}.") from None


def delimiter(path: Path, text: str) -> str:
    """Return what separates the cells of a table: Excel writes semicolons where the comma is the decimal sign."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","


def _check_one_label_a_cell(path: Path, lines: list[tuple[int, Sample]]) -> None:
    # A comma in prose proves nothing ("Ford F-150, 2012"); several labels are seen by each being a label elsewhere, or
    # by one being so where no space follows the comma.
    labels = {sample.label for _, sample in lines}
    for line, sample in lines:
        by_mark = [part for part in re.split(r"[;|]", sample.label) if part.strip()]
        by_comma = [part.strip() for part in sample.label.split(",")]
        tight = ", " not in sample.label
        several = (
            len(by_mark) > 1
            or (len(by_comma) > 1 and (labels.issuperset(by_comma) or (tight and not labels.isdisjoint(by_comma))))
            or re.fullmatch(r"\[.*,.*\]", sample.label)
        )
        if several:
            raise DataError(
                f"`{path}`, line {line}: the label `{sample.label}` looks like several labels, and each image must"
                " have exactly one; keep one (or, if it is one name, write it without `;`, `|`, commas and brackets)."
            )
