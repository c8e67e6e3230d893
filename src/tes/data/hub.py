"""`hf:NAME`: a data set of the Hugging Face Hub, or a local folder of Parquet files in its layout.

Only Parquet is read, which is data and nothing else: no loading script is ever run. The Hub converts every public data
set to Parquet by itself (the branch `refs/convert/parquet`). Images are unpacked once into `$TES_CACHE/images`, one
file each, and are then read as any other file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tes import console
from tes.data.names import readable_name
from tes.data.source import SPLIT_WORDS, LocalSource, Sample
from tes.errors import DataError, MissingExtraError, did_you_mean, listing, one_line
from tes.files import cache_dir, sha256_text, user_path, write_json
from tes.hub import require_hub

if TYPE_CHECKING:
    import pyarrow

REVISIONS = ("refs/convert/parquet", "main")
"""Where Parquet files are looked for: the Hub's own conversion, then what the owner uploaded."""
CUT_OFF = "partial-"
"""How the Hub's conversion names the folder of a split of which it holds only the beginning."""
OPTIONS = ("config", "image", "label")
LABEL_COLUMNS = ("label", "labels", "class", "target")
_SUFFIX = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Shard:
    """One Parquet file, and of which configuration and split of the data set it is a part."""

    file: Path
    config: str
    split: str
    is_cut_off: bool = False
    """Whether the split goes on: of one that is longer than 5 GB the Hub converts only the beginning to Parquet."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the image and the label, and the labels' names where they are numbers."""

    image: str
    label: str
    names: tuple[str, ...] | None


class HubSource(LocalSource):
    """Images and labels of Parquet files.

    Args:
        ref: "owner/name" on the Hub or a local folder; then, where there is a choice, `?config=…&image=…&label=…`.

    Raises:
        DataError: There is no such data set, it has no images with one label each, or a choice is open.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, ref: str) -> None:
        _require_pyarrow()
        name, _, query = ref.partition("?")
        options = _options(ref, query)
        folder = user_path(name)
        here = folder.is_dir()
        shards = _local_shards(folder) if here else fetch_shards(name, options.get("config"))
        shards = _one_config(ref, shards, options.get("config"))
        super().__init__(cache_dir() / "images", name=folder.resolve().name if here else name.rpartition("/")[2])
        self.notes: list[str] = []
        splits = self._splits(shards)
        if cut_off := sorted({shard.split for shard in shards if shard.is_cut_off and shard.split in splits}):
            self.notes.append(
                f"Of {listing(cut_off)} the Hub has only the first 5 GB as Parquet: images, maybe whole classes, are"
                " missing."
            )
        columns = _columns(ref, shards[0].file, options)
        if other := [shard.file for shard in shards if _columns(ref, shard.file, options) != columns]:
            raise DataError(
                f"`hf:{ref}`: the files `{shards[0].file}` and `{other[0]}` number the classes differently."
            )
        self.class_names = None if columns.names is None else {label: readable_name(label) for label in columns.names}
        self._files: dict[str, Path] = {}
        samples, unlabelled = [], Counter()
        for number, shard in enumerate(shards):
            if shard.split not in splits:
                continue
            for row, (file, label) in enumerate(_unpacked(ref, shard.file, columns)):
                if label is None:
                    unlabelled[shard.split] += 1
                    continue
                path = f"{shard.split or 'all'}/{number:04}-{row:06}{file.suffix}"
                self._files[path] = file
                samples.append(Sample(path, label, splits[shard.split]))
        if not samples:
            raise DataError(f"`hf:{ref}` has no labelled image in {listing(sorted(filter(None, splits))) or 'it'}.")
        if unlabelled:
            shown = listing([f"{number} of {split or 'all'}" for split, number in sorted(unlabelled.items())])
            self.notes.append(f"Left out images without a label: {shown}.")
        self.samples = samples

    def locate(self, sample: Sample) -> Path:
        """Return the sample's unpacked file."""
        return self._files[sample.path]

    def _splits(self, shards: list[Shard]) -> dict[str, str | None]:
        """Return, of the splits that the data set's author made, those that are used, as ours."""
        found = sorted({shard.split for shard in shards})
        known = {split: SPLIT_WORDS[split] for split in found if split in SPLIT_WORDS}
        if not known:
            return dict.fromkeys(found)
        if "train" not in known.values():
            raise DataError(f"`hf:` data sets need a train split; `{self.name}` has {listing(found)}.")
        if ignored := [split for split in found if split not in known]:
            self.notes.append(f"Left out the splits {listing(ignored)}, which are neither train, val nor test.")
        if len(set(known.values())) < len(known):
            raise DataError(f"`{self.name}` has several splits that mean the same: {listing(sorted(known))}.")
        return known


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "Hugging Face data sets are read with pyarrow, which is not installed: `uv sync --extra hf`,"
            " or `pip install -c constraints.txt '.[hf]'` from the clone."
        ) from None


def _options(ref: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    if wrong := [key for key in options if key not in OPTIONS]:
        near = did_you_mean(wrong[0], OPTIONS)
        raise DataError(f"`hf:{ref}`: there is no option `{wrong[0]}`.{near} Known: {listing(OPTIONS)}.")
    return options


def _local_shards(folder: Path) -> list[Shard]:
    shards = [_shard(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*.parquet"))]
    if not shards:
        raise DataError(
            f"`{folder}` holds no Parquet file; `hf:` takes a data set's name on the Hub, or a folder of Parquet files."
        )
    return shards


def _shard(path: str, file: Path) -> Shard:
    """Tell configuration and split from a file's place: `[CONFIG/]SPLIT/0000.parquet`, `[CONFIG/]SPLIT-00000-of-…`."""
    *folders, name = path.split("/")
    stem = re.sub(r"[-_.]\d+(-of-\d+)?.*$", "", name.removesuffix(".parquet"))
    split = "" if stem.isdigit() else stem.lower()
    is_cut_off = False
    if folders and (split == "" or folders[-1].lower() in SPLIT_WORDS):
        split = folders.pop().lower()
        is_cut_off, split = split.startswith(CUT_OFF), split.removeprefix(CUT_OFF)
    config = "/".join(folders)
    return Shard(file, "default" if config in ("", "data") else config, split, is_cut_off)


def _one_config(ref: str, shards: list[Shard], wanted: str | None) -> list[Shard]:
    configs = sorted({shard.config for shard in shards})
    if wanted is None and len(configs) > 1:
        name = ref.partition("?")[0]
        raise DataError(
            f"`hf:{ref}` is several data sets; choose one, as `hf:{name}?config={configs[0]}`: {listing(configs, 20)}."
        )
    if wanted is not None and wanted not in configs:
        raise DataError(
            f"`hf:{ref}` has no configuration `{wanted}`.{did_you_mean(wanted, configs)} Known: {listing(configs, 20)}."
        )
    return [shard for shard in shards if shard.config == (wanted or configs[0])]


def fetch_shards(name: str, config: str | None) -> list[Shard]:
    """Return the files of a data set on the Hub, of the splits that are used, fetched where they are not here.

    A complete fetch is remembered, so that the Hub is not needed again.

    Raises:
        DataError: There is no such data set, it has no Parquet files, or the Hub cannot be read.
    """
    memory = cache_dir() / "hub" / f"{sha256_text(name, config)}.json"
    try:
        rows = json.loads(memory.read_text())
        kept = [Shard(Path(file), str(of), str(split), any(is_cut_off)) for file, of, split, *is_cut_off in rows]
    except (OSError, ValueError, TypeError):
        kept = []
    if kept and all(shard.file.is_file() for shard in kept):
        return kept
    offline = "use a folder of its Parquet files (`hf:FOLDER`), a folder of class folders, or a CSV"
    require_hub(name, offline, DataError, repo_type="dataset")
    from huggingface_hub import hf_hub_download

    try:
        revision, listed = _listed_shards(name, config, offline)
        shards = []
        for shard in listed:
            file = hf_hub_download(name, shard.file.as_posix(), repo_type="dataset", revision=revision)
            shards.append(dataclasses.replace(shard, file=Path(file)))
    except DataError:
        raise
    except Exception as problem:
        # Network, disk or Hub, as whichever library is underneath calls it: what was fetched so far is kept.
        reason = one_line(problem)
        raise DataError(
            f"Fetching `{name}` from the Hub broke off ({reason}): run it again, or {offline}."
        ) from problem
    write_json(memory, [[str(shard.file), shard.config, shard.split, shard.is_cut_off] for shard in shards])
    return shards


def _listed_shards(name: str, config: str | None, offline: str) -> tuple[str, list[Shard]]:
    """Return a revision and those of its Parquet files that are used: of one in which no split is cut off, if any is.

    Raises:
        DataError: There are none, or a choice is open.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    cut_off = None
    for revision in REVISIONS:
        try:
            files = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
        except RevisionNotFoundError:
            continue
        found = [_shard(path, Path(path)) for path in sorted(files) if path.endswith(".parquet")]
        if not found:
            continue
        try:
            found = _one_config(name, found, config)
        except DataError:
            if cut_off is None:
                raise
            continue
        used = [shard for shard in found if shard.split in SPLIT_WORDS] or found
        is_whole = not any(shard.is_cut_off for shard in used)
        if is_whole and (cut_off is None or {shard.split for shard in cut_off[1]} <= {shard.split for shard in used}):
            return revision, used
        cut_off = cut_off or (revision, used)
    if cut_off is None:
        raise DataError(f"`hf:{name}` has no Parquet files on the Hub, and nothing else is read: {offline}.")
    return cut_off


def _columns(ref: str, file: Path, options: Mapping[str, str]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"`{file}` is not a readable Parquet file: {one_line(problem, 200)}.") from None
    features = _features(schema)
    images = [field.name for field in schema if _is_image(field, features)]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    by_name = [field.name for field in schema if field.name.lower() in LABEL_COLUMNS]
    image = _choose(ref, "image", options.get("image"), images, schema.names)
    label = _choose(ref, "label", options.get("label"), classes or by_name, schema.names)
    kind = schema.field(label).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"`hf:{ref}`: the column `{label}` holds {kind}, and each image must have exactly one label.")
    names = features.get(label, {}).get("names")
    names = tuple(map(str, names)) if isinstance(names, list) else None
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"`hf:{ref}`: two classes of the column `{label}` have the same name.")
    return Columns(image, label, names)


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """Return what the `datasets` library noted about each column, or {}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _is_image(field: pyarrow.Field, features: Mapping[str, Mapping[str, Any]]) -> bool:
    import pyarrow as pa

    if features.get(field.name, {}).get("_type") == "Image":
        return True
    is_struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    return is_struct or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)


def _choose(ref: str, kind: str, wanted: str | None, found: list[str], known: list[str]) -> str:
    if wanted is not None:
        if wanted not in known:
            raise DataError(
                f"`hf:{ref}` has no column `{wanted}`.{did_you_mean(wanted, known)} Known: {listing(known, 20)}."
            )
        return wanted
    if len(found) == 1:
        return found[0]
    what = f"several columns that could be the {kind}" if found else f"no column that is clearly the {kind}"
    name, mark = ref, "&" if "?" in ref else "?"
    shown = listing(found or known, 20)
    raise DataError(f"`hf:{ref}` has {what} ({shown}); say which, as `hf:{name}{mark}{kind}={(found or known)[0]}`.")


def _unpacked(ref: str, file: Path, columns: Columns) -> Iterator[tuple[Path, str | None]]:
    """Yield (image file, label) for every row of a Parquet file, from the cache once it has been unpacked."""
    import pyarrow as pa

    status = file.stat()
    key = sha256_text("format 1", file.resolve(), status.st_size, status.st_mtime_ns, columns)
    folder = cache_dir() / "images" / key
    index = folder / "index.json"
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged
        try:
            rows = _unpack(file, columns, folder)
        except (pa.ArrowException, OSError) as problem:
            raise DataError(
                f"`{file}` of `hf:{ref}` cannot be unpacked into `{folder.parent}`: {one_line(problem, 200)}."
            ) from None
    for name, label in rows:
        yield folder / name, label


def _unpack(file: Path, columns: Columns, folder: Path) -> list[tuple[str, str | None]]:
    import pyarrow.parquet as pq

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        parquet = pq.ParquetFile(file)
        rows: list[tuple[str, str | None]] = []
        with console.progress(parquet.metadata.num_rows, "unpacking images") as progress:
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=[columns.image, columns.label]):
                for image, label in zip(
                    batch.column(columns.image).to_pylist(), batch.column(columns.label).to_pylist()
                ):
                    content = image.get("bytes") if isinstance(image, dict) else image
                    # Only bytes are taken: a path in a stranger's file is not followed; the image counts as missing.
                    suffix = next(
                        (suffix for magic, suffix in _SUFFIX.items() if (content or b"").startswith(magic)), ".img"
                    )
                    name = f"{len(rows):06}{suffix}"
                    if content is not None:
                        (temporary / name).write_bytes(content)
                    rows.append((name, _label(label, columns.names)))
                    progress.advance()
        write_json(temporary / "index.json", rows)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return rows


def _label(value: Any, names: tuple[str, ...] | None) -> str | None:
    """Return a row's label as text; None where there is none (-1 in test sets whose labels are secret)."""
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        return None
    if names is not None and isinstance(value, int):
        if value >= len(names):
            raise DataError(f"A label of the data set is {value}, but there are {len(names)} classes.")
        return names[value]
    return str(value)
