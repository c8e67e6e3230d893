"""How a backbone wants its images: size, crop, mean, std, interpolation, and where each was read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tes.config import ImageConfig
from tes.errors import ModelError

FITS = {"center": "crop", "squash": "squash", "shortest": "crop"}
"""timm's `crop_mode` and open_clip's `resize_mode`, as far as there is the same here."""
IMAGENET = {"size": 224, "crop_fraction": 1.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class ImageSettings:
    """`size` in pixels, `crop_fraction` of the image kept at test time, `mean` and `std` of RGB in 0..1.

    `fit` says what becomes of an image that is not square, at test time: `crop` keeps the middle of its longer side,
    `squash` all of it, out of proportion.
    """

    size: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    fit: str = "crop"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `preprocess.json`."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ImageSettings:
        """Read `preprocess.json`'s values; anything missing or of the wrong kind is a ModelError."""
        try:
            known = {field.name: values[field.name] for field in fields(ImageSettings) if field.name != "fit"}
            known["fit"] = values.get("fit", "crop")  # files of the first days do not say
            if absent := [name for name, value in known.items() if value is None]:
                raise KeyError(absent[0])
            checked = ImageConfig.model_validate(known)
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ModelError(
                f"The image settings are wrong: `{where}`: {first['msg']} (got {first['input']!r})."
            ) from None
        except (KeyError, TypeError) as problem:
            raise ModelError(f"The image settings are incomplete or wrong: {problem}.") from None
        return ImageSettings(**checked.model_dump())


def resolve(config: ImageConfig, sources: list[tuple[str, Mapping[str, Any]]]) -> tuple[ImageSettings, dict[str, str]]:
    """Take every setting from the flag, else from the first source that has it, else assume ImageNet's.

    Args:
        config: What the user set; None where they did not.
        sources: (where, values) in order of authority; values by the names of `ImageSettings`.

    Returns:
        The settings, and for each of them where it came from.
    """
    chosen: dict[str, Any] = {}
    origin: dict[str, str] = {}
    ordered = [("your setting", {k: v for k, v in config.model_dump().items() if v is not None}), *sources]
    ordered.append(("*assumed*, the weights do not say", IMAGENET | {"interpolation": "bilinear", "fit": "crop"}))
    for field in fields(ImageSettings):
        for where, values in ordered:
            if values.get(field.name) is not None:
                chosen[field.name], origin[field.name] = values[field.name], where
                break
    return ImageSettings.from_dict(chosen), origin


def beside_weights(checkpoint: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the settings that the JSON files beside a weights file (in a run folder) or its own header give."""
    found = []
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    for name in ("preprocess.json", "config.json", "open_clip_config.json"):
        path = folder / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as problem:
                raise ModelError(f"`{path}` beside the checkpoint cannot be read as JSON: {problem}.") from None
            if isinstance(values, dict):
                if name == "preprocess.json":
                    values.setdefault("fit", "crop")  # ours of the first days do not say
                for below in ("pretrained_cfg", "preprocess_cfg"):  # timm's, open_clip's
                    values |= inner if isinstance(inner := values.get(below), dict) else {}
                found.append((f"`{name}` beside the weights", from_timm(values)))
    if checkpoint.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(checkpoint, "pt") as content:
                header = content.metadata() or {}
        except (SafetensorError, OSError):
            header = {}  # the loader of the weights says what is wrong with the file
        found.append(("the weights file's header", from_timm(_parse_header(header))))
    return found


def from_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate timm's names (`input_size`, `crop_pct`, `crop_mode`) to ours; what is absent stays absent."""
    size = values.get("size", values.get("input_size"))
    if isinstance(size, (list, tuple)) and size:
        size = size[-1]
    return {
        "size": size,
        "crop_fraction": values.get("crop_fraction", values.get("crop_pct")),
        "mean": values.get("mean"),
        "std": values.get("std"),
        "interpolation": values.get("interpolation"),
        "fit": values.get("fit", FITS.get(str(values.get("crop_mode", values.get("resize_mode"))))),
    }


def _parse_header(header: Mapping[str, str]) -> dict[str, Any]:
    """Read `mean`, `std`, `input_size`, `interpolation` from a safetensors header, whose values are all text."""
    values: dict[str, Any] = {}
    try:
        for key in ("mean", "std", "input_size"):
            if key in header:
                numbers = [float(part) for part in header[key].strip("()[] ").split(",")]
                values[key] = int(numbers[-1]) if key == "input_size" else tuple(numbers)
    except ValueError:
        raise ModelError(
            f"The weights file's header gives `{key}` as {header[key]!r}, which is no list of numbers."
        ) from None
    if "interpolation" in header:
        values["interpolation"] = header["interpolation"]
    return values
