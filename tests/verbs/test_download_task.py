"""`tes download`: a task's archives from a server that the test runs, and its copy from Parquet files."""

from __future__ import annotations

import functools
import hashlib
import http.server
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from miniatures import CLASSES, build
from tes import data
from tes.config import DataConfig
from tes.data.source import open_source
from tes.data.task import load_task, task_names
from tes.errors import DataError
from tes.verbs import download as verb
from tes.verbs.download import download

SERVED = "http://127.0.0.1"


asked: list[str] = []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        asked.append(self.path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"{SERVED}:{server.server_port}"
    server.shutdown()
    server.server_close()


def from_here(monkeypatch: pytest.MonkeyPatch, folder: Path, address: str) -> None:
    """Let the entries' addresses point at the files that are served, under the same names."""

    def load(name: str):
        task = load_task(name)
        parts = []
        for part in task.downloads:
            file = folder / part.name
            md5 = hashlib.md5(file.read_bytes()).hexdigest() if file.exists() else part.md5
            parts.append(part.model_copy(update={"url": f"{address}/{part.name}", "md5": md5}))
        return task.model_copy(update={"downloads": tuple(parts)})

    monkeypatch.setattr(verb, "load_task", load)


def pack(archive: Path, folder: Path, *names: str) -> None:
    with tarfile.open(archive, "w:gz") as out:
        for name in names:
            out.add(folder / name, name)


def test_a_task_of_several_files_is_fetched_and_opens_by_its_name(served, tmp_path, monkeypatch, cli):
    folder, address = served
    original = next(build("flowers102", tmp_path / "original").rglob("setid.mat")).parent
    pack(folder / "102flowers.tgz", original, "jpg")
    for name in ("setid.mat", "imagelabels.mat"):
        shutil.copy(original / name, folder / name)
    from_here(monkeypatch, folder, address)
    root = tmp_path / "data"
    asked.clear()
    (folder / "setid.mat").rename(tmp_path / "setid.mat")
    code, _, err = cli("download", "flowers102", "--data-root", root, "--partial")
    assert code == 2 and "setid.mat answers with status 404" in err
    (tmp_path / "setid.mat").rename(folder / "setid.mat")
    code, out, err = cli("download", "flowers102", "--data-root", root, "--partial")
    assert (code, out.strip()) == (0, f"flowers102: {root / 'flowers-102'}"), err
    assert "licence: research use" in err
    assert asked.count("/102flowers.tgz") == 1  # what had been fetched before was kept
    assert sorted(path.name for path in root.iterdir()) == ["flowers-102"]  # no archive is left
    found = open_source("flowers102", root=str(root), partial=True)
    assert {sample.label for sample in found.samples} == set(CLASSES["flowers102"].values())
    code, out, err = cli("download", "flowers102", "--data-root", root, "--partial")
    assert code == 0 and "is in" in err and "already" in err
    code, _, err = cli("download", "flowers102", "--data-root", root)
    assert code == 2 and "6 train images instead of 1020" in err


def test_the_archive_in_an_archive_is_the_one_that_is_kept(served, tmp_path, monkeypatch):
    folder, address = served
    build("caltech101", tmp_path / "original")
    images = next(path for path in (tmp_path / "original").rglob("101_ObjectCategories"))
    pack(tmp_path / "101_ObjectCategories.tar.gz", images.parent, "101_ObjectCategories")
    with zipfile.ZipFile(folder / "caltech-101.zip", "w") as out:
        out.write(tmp_path / "101_ObjectCategories.tar.gz", "caltech-101/101_ObjectCategories.tar.gz")
        out.writestr("caltech-101/Annotations.tar", b"not needed")
    from_here(monkeypatch, folder, address)
    assert download("caltech101", str(tmp_path / "data"), partial=True).name == "101_ObjectCategories"
    left = {path.name for path in (tmp_path / "data").rglob("*") if path.suffix in (".gz", ".tar", ".zip")}
    assert left == set()


def test_a_dead_link_names_the_other_ways(served, tmp_path, monkeypatch):
    from_here(monkeypatch, *served)
    with pytest.raises(
        DataError, match=r"status 404: try `tes download food101 --from hub`, or get the file from http"
    ):
        download("food101", str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"status 404: get the file from .* and put it into"):
        download("dtd", str(tmp_path / "data"))
    with pytest.raises(DataError, match="no files any more"):
        download("cars", str(tmp_path / "data"), "publisher")
    with pytest.raises(DataError, match=r"No copy of .* on the Hub is known"):
        download("dtd", str(tmp_path / "data"), "hub")
    with pytest.raises(DataError, match=r"no task `flower102`\. Did you mean `flowers102`"):
        download("flower102", str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["cars", "food101"])
def test_a_copy_in_parquet_files_is_the_task_in_its_own_order_of_classes(tmp_path, name):
    from test_hub_source import write_parquet

    labels = list(CLASSES[name].values())
    shuffled = labels[::-1]  # copies need not keep the order
    scored = "validation" if name == "food101" else "test"  # what Food-101's copy calls its official test split
    hub = load_task(name).hub
    for first, split in ((0, "train"), (100, scored)):
        write_parquet(tmp_path / f"{name}-parquet" / split / "0000.parquet", [0, 1, 2] * 2, first, names=shuffled)
    assert (hub.image, hub.label) == ("image", "label")
    dataset = data.open_dataset(DataConfig(source=name, root=str(tmp_path), partial=True))
    assert [info.label for info in dataset.classes] == labels
    assert (len(dataset.indices("train")) + len(dataset.indices("val")), len(dataset.indices("test"))) == (6, 6)
    assert any("which image is in which split could not be verified" in note for note in dataset.notes)
    for split in ("train", scored):
        write_parquet(tmp_path / f"{name}-parquet" / split / "0000.parquet", [0, 1], 50, names=["boat", *labels[:1]])
    with pytest.raises(DataError, match=r"has classes that .* does not have: boat"):
        data.open_dataset(DataConfig(source=name, root=str(tmp_path), partial=True))


def test_every_task_can_be_fetched_from_somewhere():
    for name in task_names():
        task = load_task(name)
        assert task.downloads or task.hub


@pytest.mark.slow
def test_the_archives_are_those_that_torchvision_verifies():
    from torchvision.datasets import CIFAR10, CIFAR100, DTD, SUN397, Flowers102, Food101, OxfordIIITPet

    def entry(name: str) -> dict[str, str | None]:
        return {part.url: part.md5 for part in load_task(name).downloads}

    assert entry("cifar10") == {CIFAR10.url: CIFAR10.tgz_md5}
    assert entry("cifar100") == {CIFAR100.url: CIFAR100.tgz_md5}
    assert entry("dtd") == {DTD._URL: DTD._MD5}
    assert entry("food101") == {Food101._URL: Food101._MD5}
    assert entry("pets") == dict(OxfordIIITPet._RESOURCES)
    assert entry("sun397")[SUN397._DATASET_URL] == SUN397._DATASET_MD5
    assert entry("flowers102") == {
        Flowers102._download_url_prefix + file: md5 for file, md5 in Flowers102._file_dict.values()
    }
