"""Fetching and unpacking, against a server that the tests run themselves: breaks, dead links, hostile archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tes.data import download as module
from tes.data.download import fetch, unpack
from tes.data.task import Download
from tes.errors import DataError

CONTENT = bytes(range(256)) * 4000


class Server(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.breaks_after` bytes it hangs up, `server.knows_ranges` or not."""

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers.get("Range") else 0
        if start >= len(content):
            self.send_error(416)
            return
        partial = start and server.knows_ranges
        body = content[start:] if partial else content
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.ranges, server.breaks_after, server.knows_ranges = {"/a.bin": CONTENT}, [], None, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download_of(server: ThreadingHTTPServer, name: str = "a.bin", content: bytes = CONTENT) -> Download:
    return Download(url=f"http://127.0.0.1:{server.server_port}/{name}", md5=hashlib.md5(content).hexdigest())


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_download_that_broke_off_is_continued(server, tmp_path, knows_ranges):
    server.breaks_after, server.knows_ranges = 300_000, knows_ranges
    with pytest.raises(DataError, match=r"broke off .* are kept: run this again, or put it there"):
        fetch(download_of(server), tmp_path, "put it there")
    assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:300_000]
    server.breaks_after = None
    assert fetch(download_of(server), tmp_path, "put it there").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]


def test_a_file_that_is_there_is_verified_and_not_fetched(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch(download_of(server), tmp_path, "ask")
    assert server.ranges == []
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="is not the published file"):
        fetch(download_of(server), tmp_path, "ask")


def test_a_complete_part_is_taken_without_fetching_a_byte(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert fetch(download_of(server), tmp_path, "ask").read_bytes() == CONTENT


def test_another_file_at_the_address_is_not_kept(server, tmp_path):
    with pytest.raises(DataError, match=r"is not the published file any more .* it was not kept: ask."):
        fetch(download_of(server, content=b"other"), tmp_path, "ask")
    assert not list(tmp_path.iterdir())


def test_a_dead_link_and_no_network_name_the_alternatives(server, tmp_path):
    with pytest.raises(DataError, match=r"answers with status 404: get it from the authors."):
        fetch(download_of(server, "gone.bin"), tmp_path, "get it from the authors")
    dead = Download(url="http://127.0.0.1:9/a.bin", md5="0" * 32)
    with pytest.raises(DataError, match=r"broke off .*: run this again, or get it from the authors."):
        fetch(dead, tmp_path, "get it from the authors")


def test_no_room_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(DataError, match="make room or choose another --data-root"):
        fetch(download_of(server), tmp_path, "ask")


def tar(path: Path, members: dict[str, bytes | tuple[str, str]]) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}[content[0]], content[1]
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


@pytest.mark.parametrize(("pack", "name"), [(tar, "x.tar.gz"), (zipped, "x.zip")])
def test_two_archives_meet_in_one_folder(tmp_path, pack, name):
    unpack(pack(tmp_path / name, {"pets/images/a.jpg": b"a"}), tmp_path / "out")
    unpack(pack(tmp_path / name, {"pets/lists/b.txt": b"b", "pets/images/c.jpg": b"c"}), tmp_path / "out")
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["pets/images/a.jpg", "pets/images/c.jpg", "pets/lists/b.txt"]


@pytest.mark.parametrize(
    ("pack", "name", "members"),
    [
        (tar, "x.tar.gz", {"good.txt": b"1", "../escaped.txt": b"2"}),
        (tar, "x.tar.gz", {"up": ("link", "../.."), "up/escaped.txt": b"2"}),
        (tar, "x.tar.gz", {"null": ("device", "")}),
        (zipped, "x.zip", {"good.txt": b"1", "../escaped.txt": b"2"}),
        (zipped, "x.zip", {"/escaped.txt": b"2"}),
    ],
)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, pack, name, members):
    archive = pack(tmp_path / name, members)
    with pytest.raises(DataError, match="damaged or not safe to unpack"):
        unpack(archive, tmp_path / "a" / "out")
    assert not list((tmp_path / "a" / "out").iterdir())  # all of it or nothing
    assert not list(tmp_path.rglob("escaped.txt"))


def test_an_archive_that_grows_without_bounds_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_LIMIT", 10_000)
    for archive in (
        tar(tmp_path / "x.tar.gz", {"zeros": bytes(10_000_000)}),
        zipped(tmp_path / "x.zip", {"zeros": bytes(10_000_000)}),
    ):
        with pytest.raises(DataError, match="and was stopped"):
            unpack(archive, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


def test_a_damaged_archive_leaves_nothing(tmp_path):
    whole = tar(tmp_path / "x.tar.gz", {f"{n}.bin": CONTENT for n in range(3)}).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
