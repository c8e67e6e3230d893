"""Class names become a text classifier: one unit row per class, in the data's order, carrying its name."""

from tes.text.classifier import TextClassifier, build
from tes.text.encoder import TextEncoder, encoders, open_encoder
from tes.text.prompts import with_templates
from tes.text.report import render, text_report, warnings

__all__ = [
    "TextClassifier",
    "TextEncoder",
    "build",
    "encoders",
    "open_encoder",
    "render",
    "text_report",
    "warnings",
    "with_templates",
]
