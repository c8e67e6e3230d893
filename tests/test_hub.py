"""The look at the Hub, and fetching from it, against a small Hub that the tests run themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from small_hub import COMMIT, SmallHub

LOOK = """
import json, sys, time
from tes.errors import TextError
from tes.hub import require_hub

for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        require_hub(name, "use a local one", TextError)
        message = ""
    except TextError as error:
        message = str(error)
    print(json.dumps([message, time.monotonic() - start]))
"""


def look(*names: str, home: Path, **environment: str) -> list[tuple[str, float]]:
    """Look for models in a process of its own (huggingface_hub reads its environment once); messages and seconds."""
    run = python(LOOK, *names, home=home, **environment)
    return [tuple(json.loads(line)) for line in run.splitlines()]


def python(code: str, *arguments: str, home: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    environment = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    run = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


class Hub(SmallHub):
    """Serves the folder `server.folder` as the model `owner/model`; knows a gated model, and is ill for another."""

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(path for path in self.server.folder.iterdir() if path.is_file())
        if path.startswith("/owner/gated"):
            return self.reply(403, b"", with_body, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/owner/ill"):
            return self.reply(503, b"", with_body)
        if path == "/api/models/owner/model/revision/main":
            siblings = [{"rfilename": file.name} for file in files]
            return self.reply(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}), with_body)
        if path == f"/api/models/owner/model/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest(file)} for file in files
            ]
            return self.reply(200, json.dumps(entries), with_body)
        file = self.server.folder / path.rpartition("/")[2]
        if path.startswith("/owner/model/resolve/") and file in files:
            return self.reply(200, file.read_bytes(), with_body, {"ETag": f'"{digest(file)}"'})
        return self.reply(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path / "served"
    server.folder.mkdir()
    (server.folder / "config.json").write_text("{}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_model_that_is_there_passes_and_the_rest_is_told_apart(hub, tmp_path):
    names = ("owner/model", "owner/gated", "owner/other", "owner/ill", "not a name//")
    there, gated, unknown, ill, malformed = look(*names, home=tmp_path / "home", HF_ENDPOINT=address(hub))
    assert there[0] == ""
    assert f"`owner/gated` is gated: ask for access at {address(hub)}/owner/gated" in gated[0]
    assert "nor a public model of the Hub" in unknown[0]
    assert "answered with status 503" in ill[0]
    assert "nor a name that the Hub could know" in malformed[0]
    for message, _ in (gated, unknown, ill, malformed):
        assert message.endswith("use a local one.")
        assert "\n" not in message


def test_no_network_and_offline_by_choice_are_said_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        [(message, seconds)] = look("owner/model", home=tmp_path, HF_ENDPOINT=nowhere)
    assert f"the Hub ({nowhere}) cannot be reached" in message
    assert seconds < 5
    [(message, seconds)] = look("owner/model", home=tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids to fetch it: unset that, or use a local one." in message
    assert seconds < 5


@pytest.mark.slow
@pytest.mark.parametrize("trickle", [False, True])
def test_a_hub_that_answers_nothing_or_ever_so_slowly_is_given_up_within_15_seconds(tmp_path, trickle):
    done = threading.Event()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            if trickle:
                connection.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not done.wait(1.0):
                if trickle:
                    connection.send(b"a")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        start = time.monotonic()
        [(message, seconds)] = look("owner/model", home=tmp_path, HF_ENDPOINT=endpoint)
        done.set()
    assert "use a local one" in message
    assert seconds < 12
    assert time.monotonic() - start < 30


EMBED = """
import sys
from tes.config import TextConfig
from tes.text.encoder import open_encoder

print(open_encoder(TextConfig(encoder="bert:owner/model")).embed(["a photo of a pear"]).tobytes().hex())
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_fetched_once_and_read_from_the_local_hub_cache_from_then_on(hub, tmp_path, own_cache):
    import torch
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "pear"]
    (hub.folder / "vocab.txt").write_text("\n".join(words))
    (hub.folder / "pytorch_model.bin").write_bytes(b"never fetched")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **small)).save_pretrained(hub.folder)
    home = tmp_path / "home"
    fetched = python(EMBED, home=home, HF_ENDPOINT=address(hub))
    hub.shutdown()
    assert not list(home.rglob("pytorch_model.bin"))
    for cached in (own_cache / "text").iterdir():
        cached.unlink()
    assert python(EMBED, home=home, HF_HUB_OFFLINE="1") == fetched
    assert len(list((own_cache / "text").iterdir())) == 1
