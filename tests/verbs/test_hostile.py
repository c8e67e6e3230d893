"""Files from strangers: nothing that they bring along is run, imported, fetched or opened on their word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import tes
from tes.config import load_config
from tes.run import Run

_events: list[tuple[str, str]] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event in (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "socket.connect",
        "socket.getaddrinfo",
        "open",
    ):
        _events.append((event, str(arguments[0])))


sys.addaudithook(_audit)  # cannot be taken away again, so it listens while a test says so


@pytest.fixture
def watched():
    """Every program started, address looked up and file opened from here on."""
    global _watching
    _events.clear()
    _watching = True
    yield _events
    _watching = False


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def pickled(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Trap(proof), "names": Trap(proof)}))


def torch_zip(path: Path, proof: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": Trap(proof)}, path)


def torch_legacy(path: Path, proof: Path) -> None:
    torch.save({"state_dict": Trap(proof)}, path, _use_new_zipfile_serialization=False)


def objects(path: Path, proof: Path) -> None:
    rows = np.array([Trap(proof)], dtype=object)
    names = ("paths", "labels", "logits_vision", "names", "embeddings", "sha1", "features")
    with path.open("wb") as file:
        np.savez(file, **dict.fromkeys(names, rows))


def npy_objects(path: Path, proof: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Trap(proof)], dtype=object), allow_pickle=True)


def tagged_yaml(path: Path, proof: Path) -> None:
    path.write_text(f"seed: !!python/object/apply:os.system ['touch {proof}']\n")


WRITERS = (pickled, torch_zip, torch_legacy, objects, npy_objects, tagged_yaml)
SOME_SLOW = [objects, *(pytest.param(writer, marks=pytest.mark.slow) for writer in WRITERS if writer is not objects)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, photos, texts, resnet):
    """Two runs: a solved head with text, and all weights."""
    folder = tmp_path_factory.mktemp("made")
    base = {"data.source": str(photos), "text.encoder": f"file:{texts}", "refit": "none", "precision": "fp32", **resnet}
    for name, flags in {
        "solved": {"objective": "tes"},
        "stepped": {"objective": "tes", "train": "all", "start": "random", "optim.num_steps": 1},
    }.items():
        tes.train(load_config(flags=base | flags | {"out": str(folder / name)}))
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "solved", tmp_path / "run")


def test_the_traps_work_where_they_are_opened(tmp_path):
    for number, writer in enumerate((pickled, torch_zip, torch_legacy)):
        proof, path = tmp_path / f"proof{number}", tmp_path / f"{number}.pth"
        writer(path, proof)
        pickle.load(path.open("rb")) if writer is pickled else torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize("writer", SOME_SLOW)
@pytest.mark.parametrize("where", ["checkpoint.pth", "checkpoint.safetensors", "text.npz", "text.safetensors", "config",
                                   "classes.yaml", "classes.json", "table.csv"])  # fmt: skip
def test_what_a_user_hands_over_is_never_unpickled(cli, photos, resnet, tmp_path, writer, where):
    proof, path = tmp_path / "proof", tmp_path / (where if "." in where else f"{where}.yaml")
    writer(path, proof)
    kind = path.stem
    given = {
        "checkpoint": ("--backbone", "resnet18", "--checkpoint", path, "--objective", "ce"),
        "text": ("--text", f"file:{path}"),
        "config": ("--config", path),
        "classes": ("--classes", path),
        "table": (),
    }[kind]
    code, out, err = cli("check", path if kind == "table" else photos, *given)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ")
    assert not proof.exists()


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_no_file_of_a_run_folder_is_ever_unpickled(cli, run, photos, tmp_path, writer):
    proof = tmp_path / "proof"
    files = [path for path in run.rglob("*") if path.is_file() and "thumbnails" not in path.parts]
    assert {"model.safetensors", "config.yaml", "run.json", "splits.csv", "test.npz"} <= {path.name for path in files}
    for file in files:
        whole = file.read_bytes()
        writer(file, proof)
        for verb in (("evaluate", run), ("predict", run, photos / "red_square" / "00.png"), ("verify", run),
                     ("report", run)):  # fmt: skip
            code, _, err = cli(*verb)
            assert code in (0, 2) and "Traceback" not in err, (file, verb, err)
        assert not proof.exists(), file
        file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_no_cache_is_ever_unpickled(cli, made, photos, texts, resnet, own_cache, tmp_path, writer):
    kwargs = json.dumps(resnet["backbone.kwargs"])
    arguments = ("--backbone", "resnet18", "--set", f"backbone.kwargs={kwargs}", "--size", 32, "--objective", "ce",
                 "--checkpoint", resnet["backbone.checkpoint"])  # fmt: skip
    assert cli("train", photos, *arguments, "--out", tmp_path / "first")[0] == 0
    assert cli("check", photos, *arguments)[0] == 0
    proof, files = tmp_path / "proof", [path for path in own_cache.rglob("*") if path.is_file()]
    assert {path.relative_to(own_cache).parts[0] for path in files} >= {"scan", "features", "similar"}
    for file in files:
        writer(file, proof)
    code, _, err = cli("train", photos, *arguments, "--out", tmp_path / "second")
    assert code == 0 and not proof.exists(), err
    first, second = (Run.open(tmp_path / name).predictions("test").logits["vision"] for name in ("first", "second"))
    assert np.array_equal(first, second)


HOSTILE = {
    "name": "subprocess:check_output",
    "checkpoint": "/secret/weights.pth",
    "source_classes": "/secret/names.txt",
    "source_head": "os.system",
}


def hostile(folder: Path, proof: Path, backbone: dict, source: str, encoder: str) -> None:
    """Change a run folder as a stranger might who wants something opened."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["backbone"] |= backbone
    settings["data"] |= {"source": source, "classes": "/secret/classes.json"}
    settings["text"] |= {"encoder": encoder}
    settings["objective"] |= {"name": "os:system"}
    settings |= {"out": "/secret/out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = json.loads((folder / "run.json").read_text())
    summary["backbone"]["name"] = backbone.get("name", summary["backbone"]["name"])
    summary |= {"text": {"encoder": encoder}, "data": source, "arm": f"tes`<script>touch {proof}</script>"}
    (folder / "run.json").write_text(json.dumps(summary))
    classes = json.loads((folder / "classes.json").read_text())
    classes["classes"][0] |= {"name": "<script>alert(1)</script> ![x](http://evil.example/x.png)"}
    (folder / "classes.json").write_text(json.dumps(classes))


@pytest.mark.parametrize("kind", [pytest.param("solved", marks=pytest.mark.slow), "stepped"])
@pytest.mark.parametrize(
    ("backbone", "source", "encoder"),
    [
        (HOSTILE | {"kwargs": {"args": ["touch", "PROOF"]}}, "http://evil.example/photos.zip", "clip:evil/encoder"),
        ({"name": "hf-hub:evil/model"}, "hf:evil/data", "bert:/secret/encoder"),
        ({"checkpoint": "/secret/weights.pth"}, "/secret/photos", "file:/secret/rows.npz"),
    ],
)
def test_a_strangers_run_imports_fetches_and_reads_nothing_by_itself(
    cli, made, photos, tmp_path, watched, kind, backbone, source, encoder
):
    proof = tmp_path / "proof"
    run = shutil.copytree(made / kind, tmp_path / "stranger")
    backbone = json.loads(json.dumps(backbone).replace("PROOF", str(proof)))
    hostile(run, proof, backbone, source, encoder)
    photo = photos / "red_square" / "00.png"
    verbs = {
        "evaluate": ("evaluate", run),
        "evaluate elsewhere": ("evaluate", run, "--data", photos),
        "predict": ("predict", run, photo),
        "calibrate": ("calibrate", run),
        "report": ("report", run),
        "diagnose": ("diagnose", run, "--out", tmp_path / "diagnosis"),
        "diagnose the images": ("diagnose", run, "--data", photos, "--out", tmp_path / "diagnosis"),
        "average": ("average", run, "--out", tmp_path / "averaged"),
        "average the images": ("average", run, "--data", photos, "--out", tmp_path / "averaged"),
        "verify": ("verify", run),
        "verify the images": ("verify", run, "--data", photos),
    }
    for name, verb in verbs.items():
        code, _, err = cli(*verb)
        assert code in (0, 2) and "Traceback" not in err, (name, err)
        if name in ("evaluate", "calibrate", "report"):
            assert code == 0, (name, err)
        if ":" in backbone.get("name", "") and name in ("predict", "evaluate elsewhere", "verify the images"):
            assert code == 2 and "not imported on a run folder's word" in err, (name, err)
    assert not proof.exists()
    started = [event for event in watched if event[0] not in ("open",) and "git" not in event[1]]
    assert started == [], "a program was started, or an address looked up"
    assert not [path for event, path in watched if "secret" in path or "evil" in path]
    page = (run / "report.html").read_text()
    assert "<script>alert" not in page and "<script>touch" not in page and "evil.example/x.png" not in _links(page)
    if (tmp_path / "averaged" / "README.md").exists():
        card = (tmp_path / "averaged" / "README.md").read_text()
        assert "<script>" not in card and "![x](" not in card


def _links(page: str) -> str:
    import re

    return " ".join(re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]+)", page))


def test_a_model_card_says_names_and_paths_as_text(photos, tmp_path, settings_of):
    root = tmp_path / "photos <b>"
    for number, label in enumerate(("<script>alert(1)</script>", "![x](http:", "[click](javascript:alert)")):
        shutil.copytree(photos / sorted(path.name for path in photos.iterdir())[number], root / label.replace("/", "∕"))
    run = tes.train(settings_of(root))
    card = (run.path / "README.md").read_text()
    assert "<script>" not in card and "![" not in card and "](" not in card.replace("](https://arxiv.org", "")
    tes.report(run.path)
    assert "<script>alert" not in (run.path / "report.html").read_text()


@pytest.fixture
def settings_of(resnet, tmp_path):
    def make(root: Path):
        return load_config(
            flags={
                "data.source": str(root),
                "objective": "ce",
                "out": str(tmp_path / "card"),
                **resnet,
                "refit": "none",
            }
        )

    return make
