"""The first look at every image, and what is remembered of it."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from PIL import Image

from tes.data.folder import FolderSource
from tes.data.scan import scan
from tes.data.source import Sample


class Counting(FolderSource):
    """Lists what is read from it, and can be interrupted."""

    def __init__(self, ref, interrupted_at=None):
        super().__init__(ref)
        self.read_paths = []
        self.interrupted_at = interrupted_at

    def read(self, sample):
        if sample.path == self.interrupted_at:
            raise KeyboardInterrupt
        self.read_paths.append(sample.path)
        return super().read(sample)


def look(root):
    source = Counting(root)
    return source, scan(source, source.samples)


def test_the_scan_gives_each_files_sha1_in_the_order_of_the_samples(photos):
    root = photos(cat=3, dog=2)
    source, seen = look(root)
    assert seen.sha1s == [hashlib.sha1((root / sample.path).read_bytes()).hexdigest() for sample in source.samples]
    assert seen.unreadable == []


def test_unreadable_images_have_no_sha1_and_are_listed_with_the_reason(photos, tmp_path):
    root = photos(cat=2, dog=1)
    (root / "cat/a.jpg").write_text("this is text")
    (root / "cat/b.jpg").write_bytes(b"")
    (root / "cat/c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.effect_noise((64, 64), 80).save(root / "cat/d.jpg")
    (root / "cat/d.jpg").write_bytes((root / "cat/d.jpg").read_bytes()[:-200])
    source, seen = look(root)
    assert seen.unreadable == [
        ("cat/a.jpg", "not an image"),
        ("cat/b.jpg", "empty file"),
        ("cat/c.jpg", "no such file"),
        ("cat/d.jpg", "truncated file"),
    ]
    assert {sample.path for sample, sha1 in zip(source.samples, seen.sha1s) if sha1 is None} == {
        path for path, _ in seen.unreadable
    }


def test_a_second_scan_gives_the_same_and_reads_no_file_again(photos):
    root = photos(cat=3, dog=2)
    first_source, first = look(root)
    second_source, second = look(root)
    assert len(first_source.read_paths) == 5
    assert second_source.read_paths == []
    assert second == first


def test_a_file_is_known_again_by_its_size_and_time(photos):
    root = photos(cat=1, dog=1)
    _, first = look(root)
    file = root / "cat/000.jpg"
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look(root)[1] == first


def test_a_file_that_changed_and_a_new_one_are_read_again_and_no_other(photos, photo):
    root = photos(cat=2, dog=2)
    look(root)
    photo(root / "cat/000.jpg", content="something else")
    os.utime(root / "cat/000.jpg", ns=(1, 1))
    photo(root / "cat/002.jpg")
    source, seen = look(root)
    assert sorted(source.read_paths) == ["cat/000.jpg", "cat/002.jpg"]
    assert seen.sha1s[0] == hashlib.sha1((root / "cat/000.jpg").read_bytes()).hexdigest()


def test_an_unreadable_image_is_looked_at_again_for_a_decoder_may_have_been_installed_since(photos):
    root = photos(cat=1, dog=1)
    (root / "cat/a.heic").write_bytes(b"no photo")
    look(root)
    source, seen = look(root)
    assert source.read_paths == ["cat/a.heic"]
    assert [path for path, _ in seen.unreadable] == ["cat/a.heic"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"cat/000.jpg": "nonsense", "dog/000.jpg": [1, 2]})])
def test_a_damaged_memory_costs_a_second_look_and_nothing_else(photos, own_cache, content):
    root = photos(cat=1, dog=1)
    _, first = look(root)
    (memory,) = (own_cache / "scan").iterdir()
    memory.write_text(content)
    source, second = look(root)
    assert len(source.read_paths) == 2
    assert second == first


def test_where_nothing_can_be_kept_the_scan_still_works_and_warns(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TES_CACHE", str(tmp_path / "file/cache"))
    source, seen = look(photos(cat=1, dog=1))
    assert None not in seen.sha1s
    assert len(source.read_paths) == 2
    assert "cannot be kept" in capsys.readouterr().err


def test_two_data_sets_with_equal_paths_are_not_confused(tmp_path, photo):
    for name in ("first", "second"):
        for label in ("cat", "dog"):
            file = photo(tmp_path / name / label / "0.jpg", content=f"{name} {label}")
            os.utime(file, ns=(1, 1))
    first, second = look(tmp_path / "first")[1], look(tmp_path / "second")[1]
    assert set(first.sha1s).isdisjoint(second.sha1s)


def test_what_was_seen_before_an_interruption_is_kept(photos):
    root = photos(cat=3, dog=2)
    interrupted = Counting(root, interrupted_at="dog/001.jpg")
    with pytest.raises(KeyboardInterrupt):
        scan(interrupted, interrupted.samples)
    source, seen = look(root)
    assert source.read_paths == ["dog/001.jpg"]
    assert None not in seen.sha1s


def test_a_part_of_the_data_shares_the_memory_of_the_whole(photos):
    root = photos(cat=2, dog=2)
    look(root)
    part = Counting(root)
    seen = scan(part, part.samples[1:3])
    assert part.read_paths == []
    assert seen.sha1s == [
        hashlib.sha1((root / path).read_bytes()).hexdigest() for path in ("cat/001.jpg", "dog/000.jpg")
    ]
    again, _ = look(root)
    assert again.read_paths == []


def test_a_folder_called_like_an_image_and_an_impossible_path_are_reported(photos):
    source = FolderSource(photos(cat=1, dog=1))
    (source.root / "cat/folder.jpg").mkdir()
    seen = scan(source, [Sample("cat/folder.jpg", "cat"), Sample("cat/zero\0byte.jpg", "cat")])
    assert seen.sha1s == [None, None]
    assert [path for path, _ in seen.unreadable] == ["cat/folder.jpg", "cat/zero\0byte.jpg"]
    assert seen.unreadable[0][1] == "is a directory"
    assert "null byte" in seen.unreadable[1][1]


def test_a_pipe_among_the_images_is_reported_and_not_waited_for(photos):
    source = FolderSource(photos(cat=1, dog=1))
    os.mkfifo(source.root / "cat/pipe.jpg")
    seen = scan(source, [Sample("cat/pipe.jpg", "cat")])
    assert seen.unreadable == [("cat/pipe.jpg", "not a regular file")]
