"""Rooms may import only rooms below them; and the light rooms never import the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tes"
ROOMS = [
    {"errors", "files", "registry", "console", "interruption"},
    {"config"},
    {"metrics", "predictions", "statistics", "hub", "demo_images"}
    | {"calibration", "diagnosis", "dot_plot", "doubts", "mistakes"},
    {"data", "run"},
    {"text", "models"},
    {"objectives"},
    {"engine"},
    {"run_writer", "card", "settle", "search", "resume"},
    {"comparison", "benchmark_folder", "loaded", "reopen"},
    {"prepare"},
    {"against", "page"},
    {"job"},
    {"verbs"},
    {"catalogue"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
LOOKUPS = {("config", "objectives")}  # config asks the registry for an objective's own settings, at call time
HEAVY = ("torch", "torchvision", "timm", "transformers", "sklearn", "scipy", "matplotlib")
LIGHT_ROOMS = (
    "errors",
    "files",
    "registry",
    "console",
    "config",
    "metrics",
    "predictions",
    "statistics",
    "calibration",
    "diagnosis",
    "dot_plot",
    "doubts",
    "mistakes",
    "data",
    "run",
    "comparison",
    "benchmark_folder",
    "page",
    "cli",
    "text",
)
LIGHT_VERBS = ("tes.verbs.report",)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tes":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tes.")}
    return found & LEVEL.keys()


def test_every_module_has_a_level():
    assert {room_of(path) for path in SOURCE.rglob("*.py")} <= LEVEL.keys()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path):
    room = room_of(path)
    wrong = {
        other
        for other in imports(path)
        if other != room and LEVEL[other] > LEVEL[room] and (room, other) not in LOOKUPS
    }
    assert not wrong, f"{room} (level {LEVEL[room]}) imports {wrong}, which lie above it"


def test_light_rooms_import_without_the_heavy_libraries():
    modules = [
        ".".join(("tes", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(SOURCE.rglob("*.py"))
        if room_of(path) in LIGHT_ROOMS
    ]
    modules += LIGHT_VERBS
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
