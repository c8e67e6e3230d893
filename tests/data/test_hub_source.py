"""`hf:` data sets: Parquet folders as `datasets` writes them, and fetching from a small Hub that the test runs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tes
from small_hub import SmallHub
from tes.config import DataConfig
from tes.data.dataset import open_dataset
from tes.data.source import open_source
from tes.errors import DataError

NAMES = ["tabby_cat", "boxer dog", "Bee"]


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, size=(12, 12, 3), dtype="uint8")
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def write_parquet(
    path: Path, labels: Sequence[int | str | None], first: int = 0, names: list[str] | None = NAMES, **columns: list
) -> Path:
    """Write a file as the `datasets` library does: images as {bytes, path}, its features in the schema's metadata."""
    images = [{"bytes": picture(first + row), "path": f"{row}.png"} for row in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels), **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    root = tmp_path / "animals"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", [2, 0, 1] * 4)
    write_parquet(root / "data" / "train-00001-of-00002.parquet", [0, 1, 2], first=100)
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", [0, 1, 2], first=200)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", [0, 0, 1, 2], first=300)
    return root


def test_classes_come_in_the_order_of_the_numbers_with_the_official_splits(dataset_folder):
    dataset = open_dataset(DataConfig(source=f"hf:{dataset_folder}"))
    assert dataset.name == "animals"
    assert [(info.label, info.name) for info in dataset.classes] == [
        ("tabby_cat", "tabby cat"), ("boxer dog", "boxer dog"), ("Bee", "bee")
    ]  # fmt: skip
    assert {split: len(dataset.indices(split)) for split in ("train", "val", "test")} == {
        "train": 15, "val": 3, "test": 4
    }  # fmt: skip
    index = dataset.paths.index("train/0001-000002.png")  # files are numbered in the order of their names: test first
    assert dataset.classes[dataset.labels[index]].label == "boxer dog"
    assert dataset.sha1s[index] == hashlib.sha1(picture(2)).hexdigest()
    assert dataset.read_image(index).size == (12, 12)


def test_images_are_unpacked_once(dataset_folder, own_cache):
    first = open_source(f"hf:{dataset_folder}")
    times = {path: path.stat().st_mtime_ns for path in (own_cache / "images").rglob("*.png")}
    assert len(times) == 22
    again = open_source(f"hf:{dataset_folder}")
    assert again.samples == first.samples
    assert times == {path: path.stat().st_mtime_ns for path in (own_cache / "images").rglob("*.png")}
    assert not list((own_cache / "images").glob(".unpacking-*"))


def test_images_without_a_label_and_unknown_splits_are_left_out_and_said(tmp_path):
    write_parquet(tmp_path / "d" / "train" / "0000.parquet", [0, 1, 2, -1, None])
    write_parquet(tmp_path / "d" / "unsupervised" / "0000.parquet", [-1, -1], first=50)
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert [sample.label for sample in source.samples] == ["tabby_cat", "boxer dog", "Bee"]
    assert source.notes == [
        "Left out the splits unsupervised, which are neither train, val nor test.",
        "Left out images without a label: 2 of train.",
    ]


def test_files_that_number_the_classes_differently_are_refused(dataset_folder):
    write_parquet(dataset_folder / "data" / "train-00002-of-00003.parquet", [0, 1, 2], names=NAMES[::-1])
    with pytest.raises(DataError, match="number the classes differently"):
        open_source(f"hf:{dataset_folder}")


def test_a_path_in_the_file_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(1))
    images = [{"bytes": picture(number), "path": None} for number in range(6)]
    images[0] = {"bytes": None, "path": str(secret)}
    table = pa.table({"image": images, "label": ["a", "b"] * 3})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    dataset = open_dataset(DataConfig(source=f"hf:{tmp_path / 'd'}"))
    assert dataset.unreadable == [("train/0000-000000.img", "no such file")]
    assert len(dataset.paths) == 5


def test_an_open_choice_is_named_with_how_to_make_it(tmp_path):
    root = tmp_path / "cifar"
    write_parquet(root / "train.parquet", [0, 1, 2], names=None, fine_label=[0, 1, 1], photo=[picture(1)] * 3)
    with pytest.raises(DataError, match=r"several columns that could be the image \(image, photo\).*\?image=image"):
        open_source(f"hf:{root}")
    chosen = open_source(f"hf:{root}?image=photo&label=fine_label")
    assert [sample.label for sample in chosen.samples] == ["0", "1", "1"]
    with pytest.raises(DataError, match=r"no column `fine_lable`\. Did you mean `fine_label`"):
        open_source(f"hf:{root}?image=photo&label=fine_lable")
    with pytest.raises(DataError, match=r"no option `labels`\. Did you mean `label`"):
        open_source(f"hf:{root}?labels=x")
    write_parquet(root / "other" / "train.parquet", [0, 1])
    with pytest.raises(DataError, match=r"several data sets; choose one, as `hf:.*\?config=default`: default, other"):
        open_source(f"hf:{root}")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda file: file.write_bytes(b"PAR1 no parquet"), "not a readable Parquet file"),
        (lambda file: file.unlink(), "holds no Parquet file"),
        (lambda file: write_parquet(file, [7, 0, 1]), "A label of the data set is 7, but there are 3 classes"),
        (lambda file: write_parquet(file, [0, 1], names=["a", "a"]), "two classes .* have the same name"),
        (lambda file: write_parquet(file, [[0, 1], [1]]), "each image must have exactly one label"),
        (lambda file: write_parquet(file, [-1, -1]), "has no labelled image"),
    ],
)
def test_what_is_no_data_set_is_said_in_one_sentence(tmp_path, damage, sentence):
    file = write_parquet(tmp_path / "d" / "train.parquet", [0, 1, 2])
    damage(file)
    with pytest.raises(DataError, match=sentence):
        open_source(f"hf:{tmp_path / 'd'}")


def test_a_model_is_trained_from_it(dataset_folder, resnet, tmp_path):
    flags = {**resnet, "data.source": f"hf:{dataset_folder}", "objective": "ce", "out": str(tmp_path / "run")}
    run = tes.train(tes.load_config(flags=flags), against=False)
    with np.load(tmp_path / "run" / "predictions" / "test.npz") as saved:
        assert saved["labels"].tolist() == [0, 0, 1, 2]
    assert list(run.metrics["test"]) == ["vision"]
    tes.report(run, data=f"hf:{dataset_folder}")
    with (run.path / "doubts.csv").open() as file:
        assert all(Path(row["path"]).is_file() for row in csv.DictReader(file))  # so that it can be trained on


class Hub(SmallHub):
    """Serves the folders `server.folders`, by branch, as those of the data set `owner/animals`."""

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        if path.endswith("/README.md") and "owner/animals" in path:
            return self.reply(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        for branch, folder in self.server.folders.items():
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.parquet")}
            if path.startswith(f"/api/datasets/owner/animals/tree/{branch}"):
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"}
                    for name, file in files.items()
                ]
                return self.reply(200, json.dumps(entries).encode(), with_body)
            name = path.removeprefix(f"/datasets/owner/animals/resolve/{branch}/")
            if name in files and not (self.server.broken and name.startswith(self.server.broken)):
                content = files[name].read_bytes()
                return self.reply(200, content, with_body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        code = "RepoNotFound" if "owner/animals" not in path else "EntryNotFound"
        code = "RevisionNotFound" if "/tree/" in path and "owner/animals" in path else code
        return self.reply(404, b"", with_body, {"X-Error-Code": code})


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Open a data set in a process of its own, with a small Hub's address where `folders` are served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folders, server.broken = {}, ""
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def look(name: str, is_served: bool = True, home: str = "home", **environment: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
        kept |= {"HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_XET": "1", **environment}
        if is_served:
            kept["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        run = subprocess.run([sys.executable, "-c", LOOK, name], env=kept, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    look.server = server
    yield look
    server.shutdown()


LOOK = """
import sys
from tes.data.source import open_source
from tes.errors import TesError
try:
    source = open_source(sys.argv[1])
    print(len(source.samples), *source.notes)
except TesError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_hubs_own_conversion_is_fetched_once_and_read_without_a_network_from_then_on(
    tmp_path, dataset_folder, own_cache, look
):
    served = tmp_path / "served"
    for split in ("train", "validation", "test"):
        file = min((dataset_folder / "data").glob(f"{split}-*"))
        (served / "default" / split).mkdir(parents=True)
        (served / "default" / split / "0000.parquet").write_bytes(file.read_bytes())
    look.server.folders, look.server.broken = {"refs/convert/parquet": served}, "default/validation"
    assert "nor a public data set of the Hub" in look("hf:owner/plants")
    assert "Fetching `owner/animals` from the Hub broke off" in look("hf:owner/animals")
    assert "HF_HUB_OFFLINE forbids to fetch it" in look(
        "hf:owner/animals", is_served=False, HF_HUB_OFFLINE="1"
    )  # half is not a data set
    look.server.broken = ""
    assert look("hf:owner/animals") == "19"
    assert look("hf:owner/animals", is_served=False, HF_HUB_OFFLINE="1") == "19"


@pytest.mark.slow
def test_of_a_split_that_the_hub_has_cut_off_the_owners_own_files_are_taken_or_it_is_said(tmp_path, own_cache, look):
    cut_off, whole = tmp_path / "cut-off", tmp_path / "whole"
    write_parquet(cut_off / "default" / "partial-train" / "0000.parquet", [2, 0, 1])
    write_parquet(cut_off / "default" / "test" / "0000.parquet", [0, 1], first=50)
    write_parquet(whole / "data" / "train-00000-of-00001.parquet", [2, 0, 1] * 3)
    write_parquet(whole / "data" / "test-00000-of-00001.parquet", [0, 1], first=50)
    look.server.folders = {"refs/convert/parquet": cut_off, "main": whole}
    assert look("hf:owner/animals") == "11"
    other = tmp_path / "other"
    write_parquet(other / "data" / "test-00000-of-00001.parquet", [0, 1], first=50)
    look.server.folders["main"] = other  # not the same data: it has no train split
    said = look("hf:owner/animals", home="third", TES_CACHE=str(tmp_path / "third-cache"))
    assert said.startswith("5 Of train the Hub has only")
    look.server.folders = {"refs/convert/parquet": cut_off}
    for is_served in (True, False):  # the second time from what was fetched
        said = look("hf:owner/animals", is_served=is_served, home="other", TES_CACHE=str(tmp_path / "other-cache"))
        assert said.startswith("5 Of train the Hub has only the first 5 GB as Parquet")
