"""Which number format and memory layout is fast on a device for a family of networks: a table that a benchmark fills.

`benchmarks/precision.py` measures and writes `precision.json`. Looked up once per run and recorded with it, never timed
at start-up: a run that is resumed on a busier machine must not change its arithmetic.
"""

from __future__ import annotations

import json
from importlib import resources

import torch


def device_kind(device: str) -> str:
    """Return the table's name for a device; with and without bf16 instructions it is of two kinds."""
    if device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "cpu+bf16"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "cuda without bf16"  # before Ampere it is emulated, and slower than fp32
    return device


def emulates_bf16(device: str) -> bool:
    """Return whether a device computes in bf16 without instructions for it: many times slower than fp32."""
    return device_kind(device) in ("cpu", "cuda without bf16")


def resolve_precision(precision: str, memory_format: str, device: str, family: str) -> tuple[str, str, str]:
    """Return (precision, memory format, reason): the user's choice where there is one, else the table's."""
    table = json.loads(resources.files("tes.models").joinpath("precision.json").read_text(encoding="utf-8"))
    kind = device_kind(device)
    entry = table["entries"].get(kind, {}).get(family, table["fallback"])
    reason = f"table entry {kind} × {family}" + (", not measured" if not entry.get("measured") else "")
    chosen = (
        entry["precision"] if precision == "auto" else precision,
        entry["memory_format"] if memory_format == "auto" else memory_format,
    )
    return *chosen, reason if "auto" in (precision, memory_format) else "your setting"
