"""Classes and what is known about them: derived from the labels, completed by `--classes FILE`."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tes.config import NOT_YAML
from tes.data.names import NameIndex, readable_name
from tes.data.source import no_such_path
from tes.data.table import delimiter
from tes.errors import DataError, listing, one_line
from tes.files import user_path

_FIELDS = ("name", "description", "descriptions", "prompts", "coarse")


@dataclass(frozen=True)
class ClassInfo:
    """One class: its label in the data, its readable name, and the texts and coarse class that a file gave it.

    `aliases` are further names by which a file may call it.
    """

    label: str
    name: str
    descriptions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    coarse: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassRow:
    """What a classes file says about the class that it calls `key`."""

    key: str
    name: str | None = None
    descriptions: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    coarse: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def derive_classes(labels: Iterable[str]) -> list[ClassInfo]:
    """Return the distinct labels as classes, sorted by label, with readable names."""
    return [ClassInfo(label, readable_name(label)) for label in sorted(set(labels))]


def read_classes_file(path: str | Path) -> list[ClassRow]:
    """Read what a file says about classes.

    It is `{class: {"name", "description" | "descriptions" | "prompts"}}` or `{class: [sentence, ...]}` as JSON or YAML,
    or a CSV with those columns, where a class may have several rows, a description in each.

    Raises:
        DataError: The file cannot be read, a class is in it twice, or something is not the text that it should be.
    """
    path = user_path(path)
    if not path.is_file():
        raise no_such_path(path, "classes file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"`{path}` is not UTF-8 text; save it again with the encoding UTF-8.") from None
    except OSError as problem:
        raise DataError(f"`{path}` cannot be read: {problem.strerror or problem}.") from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        tree = _parse_json(path, text)
    elif suffix in (".yaml", ".yml"):
        tree = _parse_yaml(path, text)
    elif suffix in (".csv", ".tsv"):
        tree = _parse_csv(path, text)
    else:
        raise DataError(f"The classes file `{path}` must end in .json, .yaml, .yml, .csv or .tsv.")
    if not isinstance(tree, dict) or not tree:
        raise DataError(
            f'`{path}` must map each class to its texts, as in {{"cat": {{"name": "cat", "description": "..."}}}}.'
        )
    return [_row(path, key, value) for key, value in tree.items()]


def apply_classes_file(classes: Sequence[ClassInfo], path: str | Path) -> tuple[list[ClassInfo], list[str]]:
    """Give each class what the file says about it, matched by exact label, else by readable name, else by an alias.

    Returns:
        The classes in the same order, and the file's keys that match none of them.

    Raises:
        DataError: A class has no row, or a match is ambiguous.
    """
    rows = {row.key: row for row in read_classes_file(path)}
    index = NameIndex(rows.keys())
    matched: dict[str, str] = {}
    used: dict[str, str] = {}
    for info in classes:
        keys = next(filter(None, map(index.find, (info.label, info.name, *info.aliases))), [])
        if len(keys) > 1:
            raise DataError(
                f"`{path}`: the rows {_quoted(keys)} could all mean the class `{info.label}`; "
                f"keep one of them, or call one exactly `{info.label}`."
            )
        if keys:
            if keys[0] in used:
                raise DataError(
                    f"`{path}`: the row `{keys[0]}` could mean the classes `{used[keys[0]]}` and `{info.label}`; "
                    "give each a row with its exact label."
                )
            used[keys[0]], matched[info.label] = info.label, keys[0]
    if missing := [info.label for info in classes if info.label not in matched]:
        left = NameIndex(key for key in rows if key not in used)
        named = listing(
            [left.describe_unknown(label) if place < 20 else label for place, label in enumerate(missing)], limit=20
        )
        raise DataError(
            f"`{path}` has no row for {len(missing)} of the {len(classes)} classes: {named}. "
            "Add rows called exactly as the classes (an empty list takes the templates), or leave those classes out"
            " with `--only-classes`."
        )
    completed = [
        dataclasses.replace(
            info,
            name=row.name or info.name,
            descriptions=row.descriptions,
            prompts=row.prompts,
            coarse=row.coarse,
            extra=row.extra,
        )
        for info in classes
        for row in [rows[matched[info.label]]]
    ]
    return completed, [key for key in rows if key not in used]


def _row(path: Path, key: str, value: Any) -> ClassRow:
    where = f"`{path}`, class `{key}`"
    if not key.strip():
        raise DataError(f"`{path}` has a class whose name is empty; name it or drop it.")
    if not isinstance(value, dict):
        return ClassRow(key, descriptions=_sentences(where, "descriptions", value))
    if "description" in value and "descriptions" in value:
        raise DataError(f"{where}: give `description` or `descriptions`, not both.")
    for other in value.keys() - set(_FIELDS):
        if close := difflib.get_close_matches(other, _FIELDS, n=1, cutoff=0.85):
            raise DataError(f"{where}: unknown key `{other}`; did you mean `{close[0]}`?")
    described = "description" if "description" in value else "descriptions"
    return ClassRow(
        key,
        name=_sentence(where, "name", value["name"]) if "name" in value else None,
        descriptions=_sentences(where, described, value[described]) if described in value else (),
        prompts=_sentences(where, "prompts", value["prompts"]) if "prompts" in value else (),
        coarse=_sentence(where, "coarse", value["coarse"]) if "coarse" in value else None,
        extra={other: kept for other, kept in value.items() if other not in _FIELDS},
    )


def _sentences(where: str, field_name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list):  # may be empty, as for `donuts` in a published file: then the name speaks
        return tuple(_sentence(where, field_name, item) for item in value)
    return (_sentence(where, field_name, value),)


def _sentence(where: str, field_name: str, value: Any) -> str:
    if not isinstance(value, str):
        shown = json.dumps(value, ensure_ascii=False, default=str)[:60] if not isinstance(value, list) else "a list"
        raise DataError(f"{where}: `{field_name}` must be text, not {shown}; put it in quotes.")
    text = " ".join(value.split())
    if not text:
        raise DataError(f"{where}: `{field_name}` is empty; write something or drop it.")
    return text


def _parse_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise _duplicate(path, [key for key, _ in pairs])
        return tree

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise DataError(f"`{path}` is not valid JSON: {problem}.") from None
    except RecursionError:
        raise DataError(f"`{path}` is nested too deeply for a classes file.") from None


def _parse_yaml(path: Path, text: str) -> Any:
    class Loader(yaml.SafeLoader):
        """Keeps keys as they are written: a class may be called `no` or `12`."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
        keys = [key.value if isinstance(key, yaml.ScalarNode) else str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise _duplicate(path, keys)
        return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value)}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise DataError(f"`{path}` is nested too deeply for a classes file.") from None
    except NOT_YAML as problem:
        raise DataError(f"`{path}` is not valid YAML: {one_line(problem)}.") from None


def _parse_csv(path: Path, text: str) -> dict[str, dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter(path, text), strict=True)
    tree: dict[str, dict[str, Any]] = {}
    try:
        header = [name.strip().lower() for name in reader.fieldnames or []]
        if "class" not in header:
            raise DataError(f"`{path}` has no column `class`; its first line reads: {listing(header)}.")
        if len(set(header)) < len(header):
            raise _duplicate(path, header)
        reader.fieldnames = header
        for cells in reader:
            where = f"`{path}`, line {reader.line_num}"
            if None in cells or None in cells.values():
                raise DataError(f"{where}, does not have {len(header)} cells; put a cell that holds a comma in quotes.")
            if not (key := cells.pop("class").strip()):
                raise DataError(f"{where}: the cell `class` is empty; fill it or drop the row.")
            _merge(where, tree.setdefault(key, {}), {name: cell for name, cell in cells.items() if cell.strip()})
    except csv.Error as problem:
        raise DataError(f"`{path}`, line {reader.line_num}, is not valid CSV: {problem}.") from None
    return tree


def _merge(where: str, known: dict[str, Any], cells: dict[str, str]) -> None:
    for name, cell in cells.items():
        if name in ("description", "descriptions", "prompts"):
            known.setdefault("prompts" if name == "prompts" else "descriptions", []).append(cell)
        elif known.setdefault(name, cell) != cell:
            raise DataError(f"{where}: an earlier row gave this class another `{name}`, `{known[name]}`; keep one.")


def _duplicate(path: Path, keys: list[str]) -> DataError:
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return DataError(f"`{path}` has {_quoted(twice)} more than once in one place; keep one of them.")


def _quoted(names: Sequence[str]) -> str:
    return listing([f"`{name}`" for name in names])
