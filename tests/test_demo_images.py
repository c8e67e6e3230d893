from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from tes.demo_images import CLASS_NAMES, contact_sheet, draw_dataset
from tes.errors import DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("demo") / "images", images_per_class=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_each_class_has_a_folder_with_its_name_and_its_images(drawn):
    assert sorted(sub.name for sub in drawn.iterdir()) == sorted(name.replace(" ", "_") for name in CLASS_NAMES)
    for sub in drawn.iterdir():
        assert [path.name for path in sorted(sub.iterdir())] == [f"{i:03d}.png" for i in range(6)]


def test_there_are_twelve_classes_named_in_words():
    assert len(set(CLASS_NAMES)) == 12
    assert all(2 <= len(name.split()) <= 3 and name.replace(" ", "").isalpha() for name in CLASS_NAMES)


def test_images_are_small_rgb_photographs_all_different(drawn):
    images = contents(drawn)
    assert len(set(images.values())) == len(images) == 72
    for path in drawn.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((160, 160), "RGB")
            assert np.asarray(image).std() > 5


def test_the_same_seed_draws_the_same_bytes_and_a_larger_set_contains_the_smaller(drawn, tmp_path):
    smaller = contents(draw_dataset(tmp_path, images_per_class=2))
    larger = contents(drawn)
    assert len(smaller) == 24
    assert smaller == {path: larger[path] for path in smaller}


def test_another_seed_draws_other_images(drawn, tmp_path):
    other = contents(draw_dataset(tmp_path, images_per_class=1, seed=1))
    assert not set(other.values()) & set(contents(drawn).values())


def test_colours_and_shapes_show_in_the_pixels_but_pixels_do_not_settle_the_matter(drawn):
    paths = sorted(drawn.rglob("*.png"))
    labels = np.array([path.parent.name for path in paths])
    pixels = np.stack([np.asarray(Image.open(path).reduce(10), dtype=np.float32).ravel() / 255 for path in paths])
    is_train = np.array([int(path.stem) < 4 for path in paths])
    fitted = LogisticRegression(C=0.1, max_iter=1000).fit(pixels[is_train], labels[is_train])
    assert 2 / 12 < fitted.score(pixels[~is_train], labels[~is_train]) < 0.9


def test_the_contact_sheet_is_a_png_with_a_row_per_class(drawn, tmp_path):
    out_path = contact_sheet(drawn, tmp_path / "new" / "sheet.png", images_per_class=3)
    with Image.open(out_path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 12 * 80 and sheet.width > 3 * 80
    assert [path.name for path in out_path.parent.iterdir()] == ["sheet.png"]


def test_a_contact_sheet_of_nothing_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no class folders with PNG images"):
            contact_sheet(folder, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_a_path_below_a_file_is_refused_in_one_sentence(drawn, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be drawn into `.*file/demo`"):
        draw_dataset(tmp_path / "file" / "demo", images_per_class=1)
    with pytest.raises(DataError, match=r"contact sheet `.*sheet\.png` cannot be written"):
        contact_sheet(drawn, tmp_path / "file" / "sheet.png")
