"""The job of `tes report`: a page of a run or a comparison, and, of a run, the table of doubted labels beside it."""

from __future__ import annotations

from pathlib import Path

from tes import console
from tes.comparison import Comparison
from tes.data.hub import HubSource
from tes.data.source import LocalSource, open_source
from tes.data.task import load_task, task_names
from tes.data.task_source import find_folder
from tes.errors import RunError, did_you_mean, one_line
from tes.files import csv_text, user_path, write_atomic
from tes.page import comparison_page, run_page
from tes.page.comparison_page import Findings as ComparisonFindings
from tes.page.run_page import Findings, headline
from tes.run import Run

PAGE, DOUBTS = "report.html", "doubts.csv"


def report(
    folder: Run | Comparison | str | Path,
    *,
    out: str | Path | None = None,
    data: str | None = None,
    data_root: str | None = None,
) -> Path:
    """Write a run's or a comparison's page: one HTML file that needs no other and no network. Return its path.

    Beside the page of a run lies `doubts.csv`: all images of its data set with the columns of a data table, and
    `suggested` and `doubt`, the most doubted label first. One that differs, for example by your corrections, is kept.

    Args:
        folder: What `tes train` or `tes compare` left.
        out: The file; None: `report.html` in the folder.
        data: The photos, for more pictures than the folder keeps: the folder, table or task that was trained on.
        data_root: Where tasks' data sets are.

    Raises:
        RunError: The folder is neither a run nor a comparison, or not finished; or the file cannot be written.
        DataError: There are no photos where `data` says.
    """
    opened = folder if isinstance(folder, Run | Comparison) else _open(user_path(folder))
    page = user_path(out) if out is not None else opened.path / PAGE
    if page.is_dir():
        raise RunError(f"`{page}` is a folder; --out names the page's file.")
    photos = open_source(data, data_root, partial=True) if data is not None else None
    if isinstance(opened, Comparison):
        try:
            content = comparison_page(ComparisonFindings(opened, photos))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:  # as `section`, of its head
            detail = one_line(problem)
            raise RunError(
                f"The summary.json or compare.json of `{opened.path}` is damaged ({detail}); remove summary.json and"
                " run the same `tes compare` again: finished cells are kept."
            ) from None
        _write(page, content)
        return page
    found = Findings(opened, photos)
    table = page.parent / DOUBTS
    try:
        doubted = doubts_table(found)
    except RunError:  # no predictions out of fold, or no list of images; the page says so
        doubted = None
    if doubted is not None:
        _write_doubts(table, doubted)
        console.note(f"doubted labels: {table}")
    _write(page, run_page(found, headline(found), DOUBTS if doubted is not None else ""))
    return page


def doubts_table(found: Findings) -> str:
    """Return doubts.csv: what `tes train` reads, and what the model thinks of each training image's label."""
    by_path = {doubt.path: (place, doubt) for place, doubt in enumerate(found.doubts)}
    place = _places(found)
    rows = sorted(
        found.run.images,
        key=lambda image: (by_path[image.path][0] if image.path in by_path else len(by_path), image.path),
    )
    lines = []
    for image in rows:
        _, doubt = by_path.get(image.path, (0, None))
        suggested = None if doubt is None or doubt.suggested is None else found.labels[doubt.suggested]
        # What the draw of shots has left over is, in the data set, an image to train on.
        split = "train" if image.split == "unused" else image.split
        shown = None if doubt is None else f"{doubt.doubt:.4f}"
        lines.append((place.get(image.path, image.path), image.label, split, image.group, suggested, shown))
    return csv_text(("path", "label", "split", "group", "suggested", "doubt"), lines)


def _open(folder: Path) -> Run | Comparison:
    if (folder / "benchmark.json").is_file():
        raise RunError(f"`{folder}` is a benchmark, and its page is benchmark.html; name one of the comparisons in it.")
    if (folder / "compare.json").is_file():
        return Comparison.open(folder)
    if folder.is_dir() and not (folder / "run.json").is_file() and not (folder / "config.yaml").is_file():
        inside = [file.parent.name for file in folder.glob("*/run.json")]
        hint = did_you_mean(folder.name, inside) or (f" It holds runs: {', '.join(inside[:5])}." if inside else "")
        raise RunError(
            f"`{folder}` is neither a run nor a comparison: it has no run.json and no compare.json.{hint} Give a folder"
            " that `tes train` or `tes compare` wrote."
        )
    return Run.open(folder)


def _places(found: Findings) -> dict[str, str]:
    """Return the file of every image by its recorded path, as far as it can be told: nothing, where none can."""
    photos, paths = found.photos, [image.path for image in found.run.images]
    root = _root(found)
    if root is None:
        return {}
    files = {path: root / path for path in paths}
    if isinstance(photos, HubSource):
        known = {sample.path: sample for sample in photos.samples}
        files |= {path: photos.locate(known[path]) for path in paths if path in known}
    if not any(file.is_file() for file in files.values()):
        console.note(
            f"the images are not in `{root}` as files of their own (CIFAR's are packed): {DOUBTS} is to be read, not"
            " trained on"
        )
        return {}
    return {path: file.as_posix() for path, file in files.items()}


def _root(found: Findings) -> Path | None:
    """Return the folder that the images' paths start from, as far as it can be told."""
    if isinstance(found.photos, LocalSource):
        return found.photos.root.absolute()
    settings = found.run.settings.get("data", {})
    recorded = user_path(str(settings.get("source")))
    folder = recorded if recorded.is_dir() else recorded.parent if recorded.is_file() else None
    if str(recorded) in task_names():
        place = find_folder(load_task(str(recorded)), settings.get("root"))
        folder = place[1] if place is not None else None
    if folder is None:
        console.note(
            f"`{recorded}` is not here: the paths in {DOUBTS} are relative to the folder of photos; put the table"
            " there, or give the folder with --data."
        )
        return None
    return folder.absolute()


def _write_doubts(path: Path, content: str) -> None:
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else content
    except (OSError, ValueError):
        before = None
    if before != content:
        console.warn(f"`{path}` has other content, perhaps corrections of yours, and is kept; remove it for a new one.")
        return
    _write(path, content)


def _write(path: Path, content: str) -> None:
    try:
        write_atomic(path, content)
    except OSError as problem:
        raise RunError(f"`{path}` cannot be written: {problem.strerror or problem}.") from None
