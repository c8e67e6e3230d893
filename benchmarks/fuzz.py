"""Random mutations of the files that people hand over: every reader returns, or raises a TesError of one sentence.

    uv run python benchmarks/fuzz.py --inputs 12000 --seed 0

Each input is a well-formed file with a few bytes flipped, cut, doubled, moved, or put in from a list of awkward ones.
Whatever else is raised is printed with the seed that makes it again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tes.errors import TesError

AWKWARD = [
    *(bytes([code]) for code in b"\"\n\r,{}[]:'\t~\0"),
    *(b"!!python/object:os.system", b"\xff\xfe", b"\xf0\x9f\x90\x88", b"\xe2\x80\xae", b"NaN", b"1e999", b"-1"),
    *(b"99999999999999999999", b"&a *a", b"PK\x03\x04", b"\x80\x04", b"../../..", b"<script>", b"%s%n", b"null"),
]


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
    """Return the content with one to eight changes."""
    out = bytearray(content)
    for _ in range(int(draw.integers(1, 9))):
        place = int(draw.integers(0, len(out) + 1))
        length = int(draw.integers(1, 1 + max(1, len(out) // 8)))
        match int(draw.integers(0, 6)):
            case 0 if out:
                out[place % len(out)] ^= 1 << int(draw.integers(0, 8))
            case 1 if out:
                out[place % len(out)] = int(draw.integers(0, 256))
            case 2:
                del out[place : place + length]
            case 3:
                out[place:place] = AWKWARD[int(draw.integers(0, len(AWKWARD)))]
            case 4:
                out[place:place] = out[place : place + length]
            case 5:
                del out[place:]
    return bytes(out)


def table() -> bytes:
    rows = [f"{label}/{number}.jpg,{label},{split},g{number % 3}" for label in ("cat", "dog", "Größe") for number, split
            in enumerate(("train", "val", "test"))]  # fmt: skip
    return "\n".join(["path,label,split,group", *rows, '"a, b.jpg","x ""y""",train,']).encode()


def classes_json() -> bytes:
    tree = {"cat": {"name": "cat", "description": "A cat."}, "dog": ["a dog", "big dog"], "Größe": {"prompts": ["x"]}}
    return json.dumps(tree, ensure_ascii=False).encode()


def classes_yaml() -> bytes:
    return b"cat: {name: cat, description: A cat.}\nno: [a dog]\n12:\n  prompts:\n    - x\n  date: 2020-01-02\n"


def classes_csv() -> bytes:
    return b'class,name,description,coarse\ncat,cat,"A cat, small.",animal\ndog,dog,A dog.,animal\n'


def text_npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, names=np.array(["cat", "dog", "Größe"]), embeddings=np.eye(3, 5, dtype=np.float32))
    return out.getvalue()


def text_npz_compressed() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, names=np.array(["cat", "dog"]), embeddings=np.eye(2, 5, dtype=np.float16))
    return out.getvalue()


def text_safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"embeddings": np.eye(2, 4, dtype=np.float32)}, metadata={"names": json.dumps(["cat", "dog"])})


def predictions() -> bytes:
    out = io.BytesIO()
    paths, labels = np.array(["cat/0.jpg", "dog/1.jpg"]), np.array([0, 1])
    np.savez(out, paths=paths, labels=labels, logits_vision=np.eye(2, dtype=np.float32))
    return out.getvalue()


def checkpoint_pth() -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}, "epoch": 3}, out)
    return out.getvalue()


def checkpoint_legacy() -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 3)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def checkpoint_safetensors() -> bytes:
    from safetensors.numpy import save

    return save(
        {"fc.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float16)}, metadata={"mean": "0.5"}
    )


def config() -> bytes:
    return (
        b"data: {source: photos, shots: 5}\nobjective: {name: tes, temperature: 0.1}\noptim: {class_weights: {cat: 2}}"
    )


def read_table(path: Path) -> None:
    from tes.data.table import TableSource

    TableSource(path)


def read_classes(path: Path) -> None:
    from tes.data.classes_file import read_classes_file

    read_classes_file(path)


def read_text(path: Path) -> None:
    from tes.config import TextConfig
    from tes.data.classes_file import derive_classes
    from tes.text.classifier import build

    build(derive_classes(["cat", "dog"]), TextConfig(encoder=f"file:{path}"), centre=False)


def read_predictions(path: Path) -> None:
    from tes.predictions import Predictions

    Predictions.load(path)


def read_checkpoint(path: Path) -> None:
    from tes.models.checkpoint import read_weights

    read_weights(path)


def read_config(path: Path) -> None:
    from tes.config import load_config

    load_config(path)


READERS: dict[str, tuple[Callable[[Path], None], Callable[[], bytes], str]] = {
    "table, CSV": (read_table, table, ".csv"),
    "classes, JSON": (read_classes, classes_json, ".json"),
    "classes, YAML": (read_classes, classes_yaml, ".yaml"),
    "classes, CSV": (read_classes, classes_csv, ".csv"),
    "text rows, npz": (read_text, text_npz, ".npz"),
    "text rows, compressed npz": (read_text, text_npz_compressed, ".npz"),
    "text rows, safetensors": (read_text, text_safetensors, ".safetensors"),
    "predictions, npz": (read_predictions, predictions, ".npz"),
    "checkpoint, pth": (read_checkpoint, checkpoint_pth, ".pth"),
    "checkpoint, legacy pth": (read_checkpoint, checkpoint_legacy, ".pth"),
    "checkpoint, safetensors": (read_checkpoint, checkpoint_safetensors, ".safetensors"),
    "settings, YAML": (read_config, config, ".yaml"),
}


def fuzz(num_inputs: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return, per reader, how many inputs were read, refused and neither, and what was raised for the last."""
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, (name, (read, make, suffix)) in enumerate(READERS.items()):
            counts[name] = Counter()
            content, path = make(), Path(folder) / f"input{suffix}"
            path.write_bytes(content)
            read(path)
            for number in range(num_inputs // len(READERS)):
                path.write_bytes(mutated(content, np.random.default_rng((seed, kind, number))))
                try:
                    read(path)
                    counts[name]["read"] += 1
                except TesError as problem:
                    counts[name]["refused"] += 1
                    if not str(problem).strip():
                        failures.append(f"{name}, input {number}: an empty sentence")
                except BaseException as problem:
                    if isinstance(problem, KeyboardInterrupt):
                        raise
                    counts[name]["neither"] += 1
                    where = traceback.extract_tb(problem.__traceback__)[-1]
                    failures.append(
                        f"{name}, input {number}: {type(problem).__name__}: {problem} ({where.filename}:{where.lineno})"
                    )
    return counts, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    counts, failures = fuzz(arguments.inputs, arguments.seed)
    for name, count in counts.items():
        print(f"{name:28}{count['read']:6} read{count['refused']:7} refused{count['neither']:5} neither")
    total = sum(sum(count.values()) for count in counts.values())
    print(f"{total} inputs in {time.monotonic() - began:.0f} s; {len(failures)} failures")
    print("\n".join(failures[:50]))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
