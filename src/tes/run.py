"""The run folder, format 1: claiming it, and reading it back. Nothing in it is ever imported or unpickled.

run.json (written last)  config.yaml  env.json  classes.json  metrics.jsonl  timing.jsonl  splits.csv
predictions/{train,val,test}.npz  per_class_{val,test}.csv  model.safetensors  preprocess.json
text_head.safetensors  start_head.safetensors  thumbnails/  README.md
until it is finished: state/ (what a training goes on from), .lock (who is writing)
later: calibration.json (`tes calibrate`)  diagnosis.{json,svg} (`tes diagnose`)  report.html  doubts.csv (`tes report`)

A cell of a comparison leaves out what all cells share: run.json names those files (`shared`), by content, and they lie
once in the comparison's folder `shared/`. `Run.file` finds a file wherever it is.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tes.config import NOT_YAML
from tes.errors import RunError, TrainingError, did_you_mean, listing, one_line
from tes.files import is_leftover, read_json, remove_leftovers, user_path
from tes.predictions import Predictions

FORMAT = 1
CONTENTS = frozenset(
    {"run.json", "config.yaml", "env.json", "classes.json", "metrics.jsonl", "timing.jsonl", "splits.csv", "README.md"}
    | {"predictions", "per_class_val.csv", "per_class_test.csv", "thumbnails", "preprocess.json"}
    | {"model.safetensors", "text_head.safetensors", "start_head.safetensors", "head.safetensors", "state"}
    | {"calibration.json", "diagnosis.json", "diagnosis.svg", "report.html", "doubts.csv"}
)
"""All that a run folder holds: a folder with anything else in it is never replaced."""


class _Recorded(BaseModel):
    """What is relied on in a file of a run, where it is there at all; more may stand in it."""

    model_config = ConfigDict(strict=True)


class _Against(_Recorded):
    metric: Literal["mean_per_class", "top1"] = "mean_per_class"
    difference: float
    num_samples: int
    interval: list[float] | None = Field(None, min_length=2, max_length=2)


class _Summary(_Recorded):
    arm: str = ""
    start: str = ""
    train: str = ""
    refit: str = ""
    protocol: str = ""
    data: str = ""
    default_head: str = ""
    primary_metric: Literal["mean_per_class", "top1"] = "mean_per_class"
    num_train: int = 0
    num_val: int = 0
    num_test: int = 0
    backbone: dict[str, Any] = {}
    text: dict[str, Any] | None = None
    metrics: dict[str, dict[str, dict[str, float | None]]] = {}
    shared: dict[str, str] = {}
    files: dict[str, str] = {}
    lost: list[dict[str, str]] = []
    against: _Against | None = None


class _DataSettings(_Recorded):
    source: str | None = None
    root: str | None = None
    shots: int | None = None
    fraction: float | None = None


class _Settings(_Recorded):
    data: _DataSettings = _DataSettings()
    objective: dict[str, Any] = {}
    seed: int = 0


class _Source(_Recorded):
    name: str
    cosine: float


class _Class(_Recorded):
    prompts: list[str] | None = None
    source: _Source | None = None


class _Classes(_Recorded):
    classes: list[_Class]


def _check(value: Any, model: type[_Recorded], path: Path) -> None:
    """Hold what a file says against what is relied on.

    Raises:
        RunError: A value is of another kind.
    """
    try:
        model.model_validate(value)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"`{path}` is damaged: `{where}`: {first['msg'][0].lower()}{first['msg'][1:]}.") from None


_SHARED_NAME = re.compile(r"[a-z_]+-[0-9a-f]{64}\.[a-z]+")


@dataclass(frozen=True)
class SplitRow:
    """One row of splits.csv: an image under its recorded path, label, split, group (or nothing) and content."""

    path: str
    label: str
    split: str
    group: str
    sha1: str


@dataclass(frozen=True)
class Run:
    """A finished run. Thin: a path and what the files below it say."""

    path: Path

    @staticmethod
    def open(path: str | Path) -> Run:
        """Open a run folder.

        Raises:
            RunError: There is no such folder, it is no run, it never finished, or another version wrote it.
        """
        folder = Path(path)
        if not folder.is_dir():
            siblings = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise RunError(f"There is no run folder `{folder}`.{did_you_mean(folder.name, siblings)}")
        if not (folder / "run.json").is_file():
            if (folder / "compare.json").is_file():
                raise RunError(
                    f"`{folder}` is a comparison; name one of its runs, `{folder}/cells/<shots>-s<seed>/<arm>`."
                )
            started = (folder / "config.yaml").is_file()
            why = "its training did not finish (there is no run.json)" if started else "there is no run.json in it"
            raise RunError(f"`{folder}` is not a finished run: {why}.")
        run = Run(folder)
        if run.summary.get("format") != FORMAT:
            raise RunError(
                f"`{folder}` has run format {run.summary.get('format')!r}; this version reads format {FORMAT}."
            )
        return run

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What run.json says: status, arm, metrics."""
        value = read_json(self.path / "run.json", RunError)
        if not isinstance(value, dict):
            raise RunError(f"`{self.path / 'run.json'}` does not hold an object.")
        _check(value, _Summary, self.path / "run.json")
        return value

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved settings as plain values."""
        try:
            value = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, *NOT_YAML) as problem:
            raise RunError(f"`{self.path / 'config.yaml'}` cannot be read: {one_line(problem)}.") from None
        if not isinstance(value, dict):
            raise RunError(f"`{self.path / 'config.yaml'}` does not hold settings.")
        _check(value, _Settings, self.path / "config.yaml")
        return value

    @cached_property
    def classes(self) -> list[dict[str, Any]]:
        """The classes in index order: `class` (folder or label), `name`, `prompts`."""
        value = read_json(self.path / "classes.json", RunError)
        try:
            rows = value["classes"]
            _ = [(str(row["class"]), str(row["name"])) for row in rows]
            if not isinstance(rows, list):
                raise TypeError
        except (TypeError, KeyError):
            raise RunError(f"`{self.path / 'classes.json'}` does not list classes.") from None
        _check(value, _Classes, self.path / "classes.json")
        return rows

    @cached_property
    def images(self) -> list[SplitRow]:
        """The images of the data set, as splits.csv lists them.

        Raises:
            RunError: It is absent or damaged.
        """
        path, wanted = self.file("splits.csv"), SplitRow.__annotations__
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except FileNotFoundError:
            raise RunError(f"There is no file `{path}`.") from None
        except (OSError, UnicodeDecodeError, csv.Error) as problem:
            raise RunError(f"`{path}` cannot be read: {one_line(problem)}.") from None
        if not rows or any(row.get(key) is None for row in rows for key in wanted):
            raise RunError(f"`{path}` does not hold a run's splits: its columns are {', '.join(wanted)}.")
        return [SplitRow(*(row[key] for key in wanted)) for row in rows]

    def file(self, name: str) -> Path:
        """Return where a file of the run is: in its folder, or, for a cell of a comparison, in `shared/`.

        Raises:
            RunError: run.json names a shared file in a way that no comparison writes.
        """
        shared = self.summary.get("shared")
        if not isinstance(shared, dict) or name not in shared:
            return self.path / name
        stored = str(shared[name])
        if not _SHARED_NAME.fullmatch(stored):
            raise RunError(f"`{self.path / 'run.json'}` names the shared file `{stored}`, which no comparison writes.")
        return self.path.parents[2] / "shared" / stored

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics per split and head, as recorded."""
        return self.summary.get("metrics", {})

    @property
    def primary_metric(self) -> str:
        """The metric that selects and is reported first, `mean_per_class` or `top1`."""
        return self.summary.get("primary_metric", "mean_per_class")

    def predictions(self, split: str) -> Predictions:
        """Return the saved predictions of `val` or `test` (of `train`: out of fold)."""
        path = self.path / "predictions" / f"{split}.npz"
        if not path.is_file():
            found = sorted(other.stem for other in path.parent.glob("*.npz"))
            raise RunError(
                f"The run `{self.path}` has no predictions for `{split}`; it has: {', '.join(found) or 'none'}."
            )
        predictions = Predictions.load(path)
        num_classes = len(self.classes)
        for head, logits in predictions.logits.items():
            if logits.shape[1] != num_classes:
                raise RunError(
                    f"`{path}` has {logits.shape[1]} columns for the head `{head}`; the run has {num_classes} classes."
                )
        return predictions


def refuse_out_among_images(out: Path, source: Path) -> None:
    """Refuse a folder for results that the data would take for a class.

    Raises:
        RunError: `out` lies below the folder of images.
    """
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise RunError(
            f"The folder `{out}` would lie among the images of `{source}` and be taken for a class; choose another"
            " --out."
        )


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes.

    The lock is the operating system's, on the file `.lock`, so that it ends with the process, however that ends. Where
    there is none (Windows, some network drives), nothing is held.

    Raises:
        RunError: Another process holds it, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / ".lock"
    try:
        file = path.open("a")
    except OSError as problem:
        raise RunError(f"The folder `{folder}` cannot be written: {problem.strerror}.") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, the children do not inherit it
            is_ours = os.fstat(file.fileno()).st_nlink > 0  # else its owner has just finished, and removed it
        except (BlockingIOError, PermissionError):
            is_ours = False
        except OSError:
            is_ours = True
        if not is_ours:
            raise RunError(
                f"Another process is writing `{folder}`; wait until it has finished, or choose another --out."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_unfinished(folder: Path) -> bool:
    """Whether a run was begun here and has not been finished."""
    return (folder / "config.yaml").is_file() and not (folder / "run.json").is_file()


def newest(out: str | None, stem: str) -> Path | None:
    """Return the run that `--resume` means: `out`, or the last of `runs/<stem>-<n>`; None where there is none."""
    if out is not None:
        path = user_path(out)
        return path if is_unfinished(path) or (path / "run.json").is_file() else None
    pattern = re.compile(re.escape(_safe(stem)) + r"-(\d+)")
    folders = Path("runs").iterdir() if Path("runs").is_dir() else ()
    numbered = [(int(match[1]), path) for path in folders if (match := pattern.fullmatch(path.name))]
    runs = [(number, path) for number, path in numbered if (path / "config.yaml").is_file()]
    return max(runs)[1] if runs else None


class Claim:
    """A run folder that is ours to fill. Until `keep` is called, a failure leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = False

    def keep(self) -> None:
        """From here on the folder holds work worth keeping, even if the run fails."""
        self.kept = True


@contextlib.contextmanager
def claim(out: str | None, stem: str, overwrite: bool, begun: Path | None = None) -> Iterator[Claim]:
    """Make the run folder, so that an output path that cannot be made is known before any work is done.

    Args:
        out: The folder; None takes the next free `runs/<stem>-<n>`.
        stem: `<data>-<arm>`.
        overwrite: Replace an existing run. The old one is put back if the new one fails and cannot go on.
        begun: An unfinished run, to be gone on with in its place.

    Raises:
        RunError: The folder cannot be made, holds something already, is no run of ours, or another process writes it.
    """
    path = user_path(out) if out is not None else None
    replaced: Path | None = None
    try:
        if begun is not None:
            path = begun
        elif path is None:
            path = _next_free(Path("runs"), stem)
        else:
            if path.is_dir() and any(entry.name != ".lock" and not is_leftover(entry) for entry in path.iterdir()):
                replaced = _set_aside(path, overwrite)
            path.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                raise NotADirectoryError(f"`{path}` is a file")
    except OSError as problem:
        raise RunError(f"The run folder `{path or 'runs'}` cannot be made: {problem.strerror or problem}.") from None
    claimed = Claim(path)
    claimed.kept = begun is not None
    with exclusive(path):
        remove_leftovers(path)
        try:
            yield claimed
        except BaseException as problem:
            can_go_on = any(path.glob("state/*.safetensors")) and not isinstance(problem, TrainingError)
            if replaced is not None and not can_go_on:
                shutil.rmtree(path, ignore_errors=True)
                replaced.rename(path)
            elif not claimed.kept:
                shutil.rmtree(path, ignore_errors=True)
                if out is None:
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()  # `runs`, where this would have been the first
            raise
        if replaced is not None or begun is not None:
            shutil.rmtree(_aside(path), ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _set_aside(path: Path, overwrite: bool) -> Path:
    if not ((path / "run.json").is_file() or (path / "config.yaml").is_file()):
        raise RunError(f"`{path}` holds files that are not a run; choose another --out.")
    if not overwrite:
        raise RunError(f"There is a run in `{path}` already; choose another --out, or replace it with --overwrite.")
    # Names with a leading dot: what an interruption, or the operating system, has left behind.
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in CONTENTS and entry.name[0] != ".")
    if foreign:
        raise RunError(
            f"`{path}` holds more than a run ({listing(foreign)}) and is not replaced; choose another --out."
        )
    if Path.cwd().is_relative_to(path.resolve()):
        raise RunError(f"`{path}` is, or holds, the folder you are in and is not replaced; choose another --out.")
    with exclusive(path):
        pass  # a run that another process is writing is not replaced
    aside = _aside(path)
    if (aside / "run.json").is_file() and not (path / "run.json").is_file():
        shutil.rmtree(path)  # a replacement that was killed: the run that it was to replace is the one to keep
        return aside
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _safe(stem: str) -> str:
    return re.sub(r"[^\w@+.-]+", "_", stem).strip("._") or "run"


def _next_free(parent: Path, stem: str) -> Path:
    stem = _safe(stem)
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number}"
        try:
            path.mkdir()  # also decides between two processes that want the same number
            return path
        except FileExistsError:
            number += 1
