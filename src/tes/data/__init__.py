"""From files to a labelled, split data set: sources, class names, the scan, the splits. No torch here."""

from tes.data.classes_file import ClassInfo
from tes.data.dataset import (
    Dataset,
    draw,
    duplicate_groups,
    find_duplicates,
    load,
    load_classes,
    load_labelled,
    open_dataset,
)
from tes.data.similar import Similar, find_similar
from tes.data.source import Sample, Source, open_source, sources

__all__ = [
    "ClassInfo",
    "Dataset",
    "Sample",
    "Similar",
    "Source",
    "draw",
    "duplicate_groups",
    "find_duplicates",
    "find_similar",
    "load",
    "load_classes",
    "load_labelled",
    "open_dataset",
    "open_source",
    "sources",
]
