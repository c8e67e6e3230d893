"""Fixtures that several rooms use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache of its own, so that no test sees what another, or the user, has cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TES_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photos and weights that lie beside the project on some machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real photos in `../shared`, which are not on this machine")
    return SHARED


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run side by side


COLOURS = {"red_square": (200, 30, 30), "green_square": (30, 200, 30), "blue_square": (30, 30, 200)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve small images that any network can tell apart. Read-only: copy it to change it."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("photos") / "squares"
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(12):
            noise = draw.integers(-30, 30, size=(40, 48, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished text rows for the classes of `photos`, and one more: what `--text file:PATH` reads."""
    import numpy as np

    path = tmp_path_factory.mktemp("texts") / "rows.npz"
    rows = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")
    np.savez(path, names=np.array([*COLOURS, "yellow_square"]), embeddings=rows)
    return path


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A ResNet small enough to train in a test, as flags by dotted key: a timm name and a local checkpoint."""
    import timm
    import torch
    from safetensors.torch import save_file

    kwargs = {"channels": [4, 8, 8, 16], "stem_width": 4}
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10, **kwargs)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return {"backbone.name": "resnet18", "backbone.kwargs": kwargs, "backbone.checkpoint": str(path), "image.size": 32}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    import sys

    from tes.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tes", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def with_prior(tmp_path_factory: pytest.TempPathFactory, resnet: dict) -> dict[str, str]:
    """Flags under which a text prior is possible: the tiny ResNet's source classes have names, and rows in a file."""
    import numpy as np

    folder = tmp_path_factory.mktemp("source")
    names = [f"thing {letter}" for letter in "abcdefghij"]
    (folder / "names.txt").write_text("\n".join(names))
    rows = np.random.default_rng(2).normal(size=(13, 6)).astype("float32")
    np.savez(folder / "rows.npz", names=np.array([*COLOURS, *names]), embeddings=rows)
    source = {"backbone.source_classes": str(folder / "names.txt"), "text.encoder": f"file:{folder / 'rows.npz'}"}
    return {**resnet, **source}


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory):
    """Return `miniature(task)`: a data root with a few images of the task in its official layout. Read-only."""
    import functools

    from miniatures import build

    return functools.cache(lambda task: build(task, tmp_path_factory.mktemp(task)))
