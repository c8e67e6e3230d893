"""The README's commands exist and do what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "" for line in block.splitlines()]
VERBS = [line.split("#")[0] for line in SHELL if line.startswith("uv run tes ")]


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in SHELL if line.endswith("pytest")]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("command", VERBS)
def test_every_flag_in_the_readme_exists(command, cli):
    _, _, _, verb, *rest = command.split()
    code, out, _ = cli(verb, "--help")
    assert code == 0
    assert all(flag in out for flag in rest if flag.startswith("--"))


def test_the_readme_holds_no_placeholder():
    assert "@@" not in README


@pytest.mark.slow
def test_the_python_lines_of_the_readme_run(tmp_path):
    from tes.demo_images import draw_dataset

    photos = draw_dataset(tmp_path / "all", images_per_class=12)
    for folder in sorted(photos.iterdir())[:3]:
        shutil.copytree(folder, tmp_path / "PHOTOS" / folder.name)
    shutil.copy(next((tmp_path / "PHOTOS").rglob("*.png")), tmp_path / "photo.jpg")
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy, prediction = done.stdout.splitlines()
    assert 0 < float(accuracy) <= 1 and len(prediction.split()) == 2


@pytest.mark.slow
def test_the_objective_of_the_guide_registers_trains_and_is_refused_where_it_would_do_nothing(tmp_path):
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = [block for kind, block in re.findall(r"```(\w*)\n(.*?)```", guide, flags=re.DOTALL) if kind == "python"]
    assert "* ...}" in code
    program = f"""
from tes.demo_images import draw_dataset
import tes
{code.replace("* ...}", "* out.logits_BC.square().mean()}")}
tes.register("objectives", "mine")(Mine)
flags = {{"data.source": str(draw_dataset("photos", images_per_class=4)), "objective": "mine@gentle", "image.size": 32}}
steps = flags | {{"train": "all", "optim.num_steps": 2, "data.shots": 1, "start": "random"}}
print(tes.train(tes.load_config(flags=steps)).summary["arm"])
try:
    tes.train(tes.load_config(flags=flags | {{"train": "head"}}))
except tes.TesError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arm, refused = done.stdout.splitlines()[-2:]
    assert arm == "mine@gentle+random" and "`mine` trains the backbone; use it with `--train all`" in refused


@pytest.mark.slow
def test_the_default_job_on_real_photos(shared, cli, tmp_path):
    names = "accordion,airplanes,anchor,ant,barrel,bass,beaver,binocular"
    out = tmp_path / "run"
    code, stdout, err = cli("train", shared / "data/caltech101", "--only-classes", names, "--shots", 5, "--out", out)
    assert code == 0, err
    from tes.run import Run

    assert Run.open(out).metrics["test"]["vision"]["mean_per_class"] > 0.8
    photo = next((shared / "data/caltech101/accordion").glob("*.jpg"))
    code, stdout, _ = cli("predict", out, photo)
    assert code == 0 and stdout.splitlines()[1].split(",")[1] == "accordion"
