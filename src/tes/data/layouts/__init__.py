"""Readers of the tasks' official layouts: `(folder, task) -> Listing`, one file per family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tes.data.layouts import cifar, class_folders, lists, matlab, parquet
from tes.data.layouts.base import Listing
from tes.data.task import Task

READERS: dict[str, Callable[[Path, Task], Listing]] = {
    "aircraft": lists.aircraft,
    "caltech101": class_folders.caltech101,
    "cars": matlab.cars,
    "cifar": cifar.cifar,
    "cub200": lists.cub200,
    "dtd": lists.dtd,
    "flowers102": matlab.flowers102,
    "food101": lists.food101,
    "parquet": parquet.parquet,
    "pets": lists.pets,
    "sun397": lists.sun397,
}
