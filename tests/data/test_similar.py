"""Near duplicates: what is found, what is not, and what is remembered."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tes import data
from tes.config import DataConfig
from tes.data import similar


def scene(seed: int, size: tuple[int, int] = (240, 160)) -> Image.Image:
    """A picture with structure at several scales, unlike any other seed's."""
    draw = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size), dtype=float)
        for side in (4, 9, 17)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def changed(image: Image.Image) -> dict[str, Image.Image]:
    width, height = image.size
    return {
        "smaller.png": image.resize((width // 2, height // 2)),
        "re-encoded.jpg": image,
        "brighter.png": ImageEnhance.Brightness(image).enhance(1.15),
        "grey.png": image.convert("L"),
        "cut-out.png": image.crop((70, 10, 190, 140)).resize((144, 156)),
    }


@pytest.fixture
def scenes(tmp_path):
    for number in range(8):
        folder = tmp_path / "scenes" / ("first" if number % 2 else "second")
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / f"{number:02}.png")
    for name, image in changed(scene(0)).items():
        image.save(tmp_path / "scenes" / "first" / name, quality=40)
    return tmp_path / "scenes"


def opened(root):
    return data.open_dataset(DataConfig(source=str(root)))


def test_changed_copies_and_crops_are_found_and_nothing_else(scenes):
    dataset = opened(scenes)
    pairs = {
        tuple(sorted((dataset.paths[pair.first], dataset.paths[pair.second]))): pair.kind
        for pair in data.find_similar(dataset)
    }
    versions = {"second/00.png", *(f"first/{name}" for name in changed(scene(0)))}
    assert {path for pair in pairs for path in pair} == versions
    found = {path for pair in pairs for path in pair if "second/00.png" in pair}
    assert found == versions
    assert pairs["first/cut-out.png", "second/00.png"] == "crop"
    assert pairs["first/smaller.png", "second/00.png"] == "near"


def test_a_second_look_reads_no_image_and_a_damaged_memory_is_mended(scenes, own_cache):
    dataset = opened(scenes)
    found = data.find_similar(dataset)
    (memory,) = (own_cache / "similar").iterdir()
    for file in scenes.rglob("*.*g"):
        file.rename(file.with_suffix(".away"))
    assert data.find_similar(dataset) == found
    for file in scenes.rglob("*.away"):
        original = [path for path in dataset.paths if path.startswith(f"{file.parent.name}/{file.stem}.")]
        file.rename(scenes / original[0])
    for content in ("[", "{}", '[["a", "b", "near"]]', "[[1]]"):
        memory.write_text(content)
        assert data.find_similar(dataset) == found


def test_every_copy_of_a_similar_image_is_named_and_blank_images_are_nobodys_copies(scenes):
    (scenes / "second" / "copy.png").write_bytes((scenes / "second" / "00.png").read_bytes())
    for number in range(3):
        Image.new("RGB", (60, 60), (250 + number, 255, 255)).save(scenes / "first" / f"blank{number}.png")
    dataset = opened(scenes)
    named = [{dataset.paths[pair.first], dataset.paths[pair.second]} for pair in data.find_similar(dataset)]
    for original in ("second/00.png", "second/copy.png"):
        assert {"first/smaller.png", original} in named
    assert not any("blank" in path for pair in named for path in pair)
    assert {"second/00.png", "second/copy.png"} not in named  # identical: another list's business


def test_too_many_images_are_not_compared(scenes, monkeypatch):
    monkeypatch.setattr(similar, "MAX_IMAGES", 10)
    assert data.find_similar(opened(scenes)) is None


def test_the_hash_is_that_of_a_cosine_transform_by_scipy():
    from scipy.fft import dctn

    image = np.asarray(scene(3).convert("L").resize((32, 32)), dtype=np.float32)
    low = dctn(image)[:12, :12].ravel()[1:129]
    bits = np.unpackbits(similar.perceptual_hash(image).view(np.uint8))
    assert np.array_equal(bits.astype(bool), low > np.median(low))


@pytest.mark.slow
def test_faces_and_faces_easy_of_caltech_are_the_same_photographs(shared):
    root = shared / "data" / "caltech101"
    dataset = data.open_dataset(
        DataConfig(source=str(root), only_classes=("Faces", "Faces_easy", "chair", "grand_piano"))
    )
    pairs = [
        (dataset.paths[pair.first].split("/"), dataset.paths[pair.second].split("/"))
        for pair in data.find_similar(dataset)
    ]
    across = [(one[1], two[1]) for one, two in pairs if {one[0], two[0]} == {"Faces", "Faces_easy"}]
    assert len(across) >= 40 and sum(one == two for one, two in across) >= 0.9 * len(across)
    assert len(pairs) - len(across) <= 20
