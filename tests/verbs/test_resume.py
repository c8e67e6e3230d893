"""Interrupted runs go on, and end as if nothing had happened: bit for bit, whatever interrupted them and wherever."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tes
from tes.config import load_config
from tes.errors import ConfigError, Interrupted, RunError
from tes.interruption import Deferred, Stopped
from tes.verbs.compare import Settings, compare

COMPARED = ("model.safetensors", "start_head.safetensors", "metrics.jsonl", "splits.csv", "classes.json")


class Net(nn.Module):
    """A network that draws from every generator in training, and can send its process a signal."""

    def __init__(self, at: tuple[str, int] | None = None, number: int = signal.SIGTERM) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2))
        self.at, self.number, self.calls = at, number, {"train": 0, "eval": 0}
        self.threads: set[int] = set()

    def __deepcopy__(self, memo):
        copied = Net(self.at, self.number)
        copied.load_state_dict(self.state_dict())
        copied.calls, copied.threads = self.calls, self.threads  # counted together
        return copied

    def forward(self, images_B3HW):
        mode = "train" if self.training else "eval"
        self.calls[mode] += 1
        if (mode, self.calls[mode]) == self.at:
            os.kill(os.getpid(), self.number)
        if self.training:
            self.threads.add(torch.get_num_threads())
        features_BF = self.layers(images_B3HW).mean(dim=(2, 3))
        return features_BF * (1 + 0.1 * np.random.rand() + 0.1 * random.random()) if self.training else features_BF


@pytest.fixture
def settings(photos, texts, tmp_path):
    def make(**flags):
        base = {"data.source": str(photos), "text.encoder": f"file:{texts}", "out": str(tmp_path / "run")}
        base |= {"image.size": 32, "train": "all", "start": "probe", "optim.num_steps": 9, "optim.batch_size": 8}
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        return load_config(flags=base | dotted)

    return make


TES = {"objective": "tes", "augment__mixup": 0.3, "optim__accumulate": 2, "optim__freeze_norms": False}
BI_TUNING = {"objective": "bi_tuning", "optim__accumulate": 2, "optim__name": "sgd", "optim__freeze_norms": False}


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of what a run says, but of what the clock says."""
    files = [path for path in folder.rglob("*") if path.name in COMPARED or path.suffix == ".npz"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_saved(folder: Path) -> dict[str, int]:
    """Return how far each training is that the run has saved."""
    found = {}
    for path in folder.glob("state/*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.stem] = json.loads(file.metadata()["training"])["step"]
    return found


def interrupted(config, at, **how) -> Path:
    """Train until a signal comes at the n-th forward pass in a mode; return the folder."""
    with pytest.raises(Interrupted) as stopped:
        tes.train(config, network=Net(at), **how)
    return stopped.value.args[0]


@pytest.mark.parametrize(
    ("flags", "at", "saved"),
    [
        (TES | {"optim__ema": 0.9}, ("train", 9), {"trial-0": 5}),  # two parts a step; an epoch has three steps
        (TES | {"start_fallback": "val"}, ("train", 9), {"trial-0": 5}),
        (BI_TUNING | {"optim__ema": 0.9}, ("train", 21), {"trial-0": 6}),  # its copy of the network passes as well
        pytest.param(TES | {"optim__ema": 0.9}, ("eval", 3), {"trial-0": 4}, marks=pytest.mark.slow),  # while scoring
        pytest.param(TES | {"refit": "trainval"}, ("train", 23), {"trial-0": 9, "refit": 3}, marks=pytest.mark.slow),
        pytest.param(TES | {"num_workers": 2}, ("train", 9), {"trial-0": 5}, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_goes_on_bit_for_bit(settings, tmp_path, flags, at, saved):
    often = {"checkpoint__every_minutes": 1e-6} if "refit" in saved else {}  # else a second is not worth keeping
    whole = tes.train(settings(**flags, out=str(tmp_path / "whole")), network=Net())
    config = settings(**flags, **often)
    folder = interrupted(config, at)
    assert steps_saved(folder) == saved and not (folder / "run.json").exists()
    with pytest.raises(RunError, match="did not finish"):
        tes.Run.open(folder)
    run = tes.train(config, network=Net(), resume=True)
    assert run.path == folder and not (folder / "state").exists() and not list(folder.rglob(".*"))
    assert content(folder) == content(whole.path) and len(content(folder)) == 8


@pytest.mark.slow
def test_a_search_chosen_on_test_goes_on_as_well(photos, texts, tmp_path):
    """Trials, the best weights so far, and a cell of a comparison that was interrupted in its second trial."""
    flags = {"data.source": str(photos), "text.encoder": f"file:{texts}", "image.size": 32, "train": "all"}
    flags |= {"optim.num_epochs": 10, "optim.batch_size": 8, "device": "cpu", "checkpoint.every_minutes": 1e-6}
    how = {"protocol": "paper", "num_trials": 2, "num_seeds": 1, "controls": False}
    whole = compare(Settings(None, flags), ("ce",), out=str(tmp_path / "whole"), network=Net(), **how)
    with pytest.raises(KeyboardInterrupt):
        compare(Settings(None, flags), ("ce",), out=str(tmp_path / "part"), network=Net(("train", 57)), **how)
    cell = tmp_path / "part" / "cells" / "all-s0" / "ce"
    assert steps_saved(cell) == {"trial-0": 40, "trial-1": 17}
    rows = (cell / "metrics.jsonl").read_bytes()
    part = compare(Settings(None, flags), ("ce",), out=str(tmp_path / "part"), network=Net(), **how)
    assert (part.path / "table.csv").read_bytes() == (whole.path / "table.csv").read_bytes()
    assert content(part.path) == content(whole.path) and not (cell / "state").exists()
    assert (cell / "metrics.jsonl").read_bytes().startswith(rows) and not (part.path / ".lock").exists()


def test_the_command_line_says_how_to_go_on_and_that_goes_on(cli, photos, texts, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import os, pathlib, signal, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Conv2d(3, 4, 3, stride=8)\n"
        "    def forward(self, x):\n"
        "        if self.training and pathlib.Path('stop').exists():\n"
        "            os.remove('stop')\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return self.layer(x).mean((2, 3))\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("stop").touch()
    command = ["train", photos, "--backbone", "own:make", "--train", "all", "--objective", "ce", "--size", "32"]
    command += ["--device", "cpu", "--set", "optim.num_steps=3"]
    code, out, err = cli(*command)
    assert code == 75 and not out
    line = err.splitlines()[-1].strip()
    assert line.startswith(f"tes train {photos} ") and line.endswith("--out runs/squares-ce-1 --resume")
    assert steps_saved(Path("runs/squares-ce-1")) == {"trial-0": 1}
    code, _, err = cli(*shlex.split(line)[1:])
    assert code == 0 and "going on after step 1 of 3" in err
    for again in (shlex.split(line)[1:], [*command, "--resume"]):  # the last run, where none is named
        code, out, err = cli(*again)
        assert code == 0 and "`runs/squares-ce-1` is finished already" in err and "run folder: runs/squares-ce-1" in out
    code, _, err = cli("train", tmp_path / "other", *command[2:], "--out", "runs/squares-ce-1", "--resume")
    assert code == 2 and "is finished, on `" in err and "other`; choose another --out." in err
    code, _, err = cli(*command, "--resume", "--lr", "0.5")
    assert code == 2 and "optim.learning_rate: 0.0001 there, 0.5 here" in err


def test_without_a_beginning_resume_begins_and_a_solved_head_begins_again(settings):
    config = settings(objective="ce", train="head", refit="none")
    Path(config.out).mkdir()
    for name in (".lock", ".config.yaml.a1b2c3_d.yaml"):  # as a kill leaves them before there is anything else
        Path(config.out, name).touch()
    with pytest.raises(Interrupted):
        tes.train(config, network=Net(("eval", 2), signal.SIGINT), resume=True)
    folder = Path(config.out)
    assert (folder / "config.yaml").is_file() and not (folder / "state").exists()
    assert tes.train(config, network=Net(), resume=True).metrics["test"] and not list(folder.rglob(".*"))
    with pytest.raises(ConfigError, match="--resume goes on with a run and --overwrite replaces it"):
        tes.train(config, network=Net(), resume=True, overwrite=True)


def test_a_run_goes_on_with_its_own_settings_images_and_weights_only(settings, photos, tmp_path):
    import shutil

    own = shutil.copytree(photos, tmp_path / "own" / "squares")
    flags = {"objective": "ce", "data__source": str(own), "optim__num_steps": 4}
    folder = interrupted(settings(**flags), ("train", 2))
    for other, why in (
        ({"optim__num_steps": 5}, "optim.num_steps: 4 there, 5 here"),
        ({"data__shots": 2}, "data.shots: None there, 2 here"),
        ({"objective": "label_smoothing"}, "objective.name: ce there, label_smoothing here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
    ):
        with pytest.raises(RunError, match=f"begun with other settings .*{why}"):
            tes.train(settings(**flags | other), network=Net(), resume=True)
    network = Net()
    with torch.no_grad():
        network.layers[0].weight.add_(1)
    with pytest.raises(RunError, match="begun with other weights than now"):
        tes.train(settings(**flags), network=network, resume=True)
    with pytest.raises(RunError, match=r"begun with other (images, )?protocol than now"):
        tes.train(settings(**flags), network=Net(), resume=True, protocol="paper")
    image = next(own.glob("*/*.png"))
    kept = image.read_bytes()
    image.unlink()
    with pytest.raises(RunError, match="begun with other images than now"):
        tes.train(settings(**flags), network=Net(), resume=True)
    image.write_bytes(kept)
    own.rename(tmp_path / "squares")  # the same images elsewhere, and what changes no result
    moved = {"data__source": str(tmp_path / "squares"), "data__root": "elsewhere"}
    moved |= {"checkpoint__every_minutes": None, "num_workers": 0}
    assert tes.train(settings(**flags | moved), network=Net(), resume=True).path == folder
    with pytest.raises(RunError, match="finished, under the protocol `val-selected`, not `paper`"):
        tes.train(settings(**flags | moved), network=Net(), resume=True, protocol="paper")


def test_a_damaged_state_is_said_to_be_and_left_alone(settings):
    config = settings(objective="ce", optim__num_steps=3)
    folder = interrupted(config, ("train", 2))
    path = folder / "state" / "trial-0.safetensors"
    whole, tensors = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        header = file.metadata()["training"]
    damaged = [
        lambda: path.write_bytes(whole[:-100]),
        lambda: save_file(tensors, path, {"training": header[:-9]}),
        lambda: save_file(tensors, path, {"training": header.replace('"format": 1', '"format": 2')}),
        lambda: save_file({**tensors, "weights:head.bias": torch.zeros(1)}, path, {"training": header}),
        lambda: save_file({k: v for k, v in tensors.items() if "exp_avg" not in k}, path, {"training": header}),
    ]
    for damage in damaged:
        damage()
        with pytest.raises(RunError, match=r"trial-0.safetensors` is damaged \(.*remove this file to begin"):
            tes.train(config, network=Net(), resume=True)
    path.write_bytes(whole)
    assert tes.train(config, network=Net(), resume=True).path == folder


@pytest.mark.slow
def test_a_run_that_was_begun_before_images_could_be_squashed_goes_on(settings):
    import yaml

    folder = interrupted(settings(objective="ce", optim__num_steps=4), ("train", 2))
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["image"].pop("fit") == "crop"
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    with pytest.raises(RunError, match=r"image\.fit: None there, squash here"):
        tes.train(settings(objective="ce", optim__num_steps=4, image__fit="squash"), network=Net(), resume=True)
    assert tes.train(settings(objective="ce", optim__num_steps=4), network=Net(), resume=True).metrics["test"]


def test_a_run_goes_on_with_the_threads_that_it_was_begun_with(settings):
    config, threads = settings(objective="ce", optim__num_steps=3), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        folder = interrupted(config, ("train", 2))
        torch.set_num_threads(1)

        network = Net()
        tes.train(config, network=network, resume=True)
        assert network.threads == {3} and torch.get_num_threads() == 1
        assert json.loads((folder / "env.json").read_text())["num_threads"] == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_an_interrupted_replacement_goes_on_and_one_that_failed_gives_the_old_run_back(settings):
    config = settings(objective="ce", optim__num_steps=3)
    folder = tes.train(config, network=Net()).path
    before = (folder / "run.json").stat().st_ino
    interrupted(config, ("train", 2), overwrite=True)
    assert tes.train(config, network=Net(), resume=True).path == folder
    new = (folder / "run.json").stat().st_ino
    assert new != before and [path.name for path in folder.parent.iterdir()] == ["run"]
    with pytest.raises(KeyboardInterrupt):
        tes.train(config, network=Net(("eval", 1), signal.SIGINT), overwrite=True)
    assert (folder / "run.json").stat().st_ino == new and tes.Run.open(folder).metrics


def holding(folder: Path) -> subprocess.Popen:
    """Return another process that writes a folder, until it is killed."""
    code = f"import pathlib, time, tes.run\nwith tes.run.exclusive(pathlib.Path({str(folder)!r})):\n"
    code += "    print('held', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl; folders are not locked there")
def test_a_folder_has_one_writer_and_a_dead_one_does_not_count(settings, photos, texts, tmp_path):
    config = settings(objective="ce", optim__num_steps=3)
    folder = interrupted(config, ("train", 2))
    flags = {"data.source": str(photos), "text.encoder": f"file:{texts}", "image.size": 32, "train": "head"}
    how = {"num_seeds": 1, "shots": ("1",), "controls": False, "network": Net()}
    comparison = tmp_path / "comparison"
    compare(Settings(None, flags), ("ce",), out=str(comparison), **how)
    others = [holding(folder), holding(comparison)]
    try:
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="Another process is writing"):
                tes.train(config, network=Net(), **more)
        plan = (comparison / "compare.json").read_bytes()
        with pytest.raises(RunError, match="Another process is writing"):
            compare(Settings(None, flags), ("ce", "label_smoothing"), out=str(comparison), **how)
        assert (comparison / "compare.json").read_bytes() == plan and (comparison / "summary.json").is_file()
    finally:
        for other in others:
            other.kill()
            other.wait()
            other.stdout.close()
    assert steps_saved(folder) == {"trial-0": 2} and (folder / ".lock").exists()
    assert tes.train(config, network=Net(), resume=True).path == folder and not (folder / ".lock").exists()


def test_signals_wait_for_the_step_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Deferred() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one was put off")
    with pytest.raises(Stopped), Deferred() as signals, signals.at_once():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Deferred():
        os.kill(os.getpid(), signal.SIGINT)  # nobody looks at it any more, and it is not lost
    assert signal.getsignal(signal.SIGTERM) == before


RUINED = """
import os, pathlib, sys, torch
from tes.cli import main

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Conv2d(3, 4, 3, stride=8), 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == 5 and sys.argv[-1] == "fill":
            with open("small/filler", "wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(512))
                except OSError:
                    pass
        return self.layer(x).mean((2, 3))

def make():
    torch.manual_seed(0)
    return Net()

def run(*more):
    sys.argv = ["tes", "train", PHOTOS, "--backbone", "own:make", "--train", "all", "--objective", "ce", "--size", "32",
                "--device", "cpu", "--set", "optim.num_steps=9", "--set", "checkpoint.every_minutes=1e-6", *more]
    try:
        main()
    except SystemExit as left:
        print("exit", left.code, flush=True)

def script():
    run("--out", "whole")
    run("--out", "small/run", "--config", "fill")
    print(sorted(os.listdir("small/run/state")))
    os.remove("small/filler")
    run("--out", "small/run", "--resume")
    for name in ("model.safetensors", "metrics.jsonl"):
        print(pathlib.Path("whole", name).read_bytes() == pathlib.Path("small/run", name).read_bytes())
    run("--out", "fixed/run")
"""


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_folder_are_one_sentence_and_cost_nothing(photos, tmp_path):
    """A small disk that is full in the fifth step, and a folder that the system lets nobody write, not even root."""
    (tmp_path / "own.py").write_text(RUINED.replace("PHOTOS", repr(str(photos))))
    for name in ("small", "fixed"):
        (tmp_path / name).mkdir()
    (tmp_path / "fill").write_text("{}")
    mounts = "mount -t tmpfs -o size=1m tmpfs small && mount --bind fixed fixed && mount -o remount,ro,bind fixed"
    can = subprocess.run(["unshare", "-rm", "sh", "-c", mounts], cwd=tmp_path, capture_output=True, text=True)
    if can.returncode:
        pytest.skip(f"this system does not let us mount a small disk: {can.stderr.strip()}")
    command = f"{mounts} && exec {shlex.quote(sys.executable)} -c 'import own; own.script()'"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("exit", "[", "True", "False"))]
    assert lines == ["exit 0", "exit 2", "['begun.json', 'trial-0.safetensors']", "exit 0", "True", "True", "exit 2"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "`small/run/state/trial-0.safetensors` cannot be written: " in errors[0] and "after step 4 is" in errors[0]
    assert "No space left on device" in errors[0] and "going on after step 4 of 9" in done.stderr
    assert errors[1:] == ["error: The run folder `fixed/run` cannot be made: Read-only file system."]


@pytest.mark.slow
def test_trainings_that_are_killed_at_random_moments_end_with_equal_bytes():
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, script, "--kills", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 ends (2 by SIGKILL, 2 by SIGTERM, 2 by SIGKILL in a checkpoint)")
