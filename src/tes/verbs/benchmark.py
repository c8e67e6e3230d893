"""The job of `tes benchmark`: a comparison for each task × backbone × text encoder, and one table over all of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tes import console, data
from tes.benchmark_folder import Benchmark, Combination, read_published, write_tables
from tes.comparison import BASELINE
from tes.errors import ConfigError, DataError, RunError, TesError, one_line
from tes.files import sha256_text, user_path, write_atomic, write_json
from tes.objectives import objectives
from tes.page import benchmark_page
from tes.run import exclusive
from tes.run_writer import environment
from tes.settle import check_needs
from tes.verbs.compare import Settings, check_axes, compare


@dataclass(frozen=True)
class _Part:
    """A point on one axis: what it is called, and the settings that it stands for."""

    label: str
    flags: Mapping[str, Any]
    file: Path | None = None


def benchmark(
    settings: Settings | Mapping[str, Any],
    sources: Sequence[str],
    backbones: Sequence[str],
    texts: Sequence[str],
    arms: Sequence[str],
    *,
    out: str,
    shots: Sequence[str] = ("all",),
    num_seeds: int = 3,
    first_seed: int = 0,
    num_trials: int = 1,
    protocol: str = "val",
    controls: bool = True,
    published: str | None = None,
) -> Benchmark:
    """Compare arms on every task, with every backbone and every text encoder, and write one table over all.

    Started again it goes on where it was: finished cells are kept. Data that are not there are listed with what their
    loader says, a combination that fails with its sentence, and the others go on.

    Args:
        settings: What everything shares; a mapping of dotted keys will do.
        sources: Tasks, folders, CSVs.
        backbones: Names; `NAME=CHECKPOINT`; or YAML files with the settings of a backbone, its optimiser included.
        texts: Text encoders.
        arms: As for `compare`; `ce` is added where it is missing.
        out: The benchmark's folder.
        shots: As for `compare`.
        num_seeds: How many seeds.
        first_seed: From which one on.
        num_trials: Of the search in each comparison.
        protocol: `val`, or `paper`.
        controls: Add the arms that tell where a gain comes from, where an arm starts from more than a probe.
        published: A CSV with published figures; see `read_published`.

    Raises:
        TesError: What would stop every combination; or none of them could be compared.
    """
    if not isinstance(settings, Settings):
        settings = Settings(flags=settings)
    figures = read_published(user_path(published)) if published is not None else {}
    arms = list(dict.fromkeys(arms if BASELINE in arms else [BASELINE, *arms]))
    check_axes(arms, shots, num_seeds, num_trials, "test", protocol)
    tasks = _axis("data sources", [_Part(user_path(ref).resolve().stem, {"data.source": ref}) for ref in sources])
    networks = _axis("--backbones", [_backbone(spec) for spec in backbones])
    if settings.file is not None and (own := [part.label for part in networks if part.file is not None]):
        raise ConfigError(
            f"--config and the YAML file of the backbone `{own[0]}` cannot both be read; write into the latter what is"
            " in the former, or give that with --set."
        )
    encoders = _axis("--texts", [_Part(spec, {"text.encoder": spec}) for spec in texts])
    for network in networks:  # a mistake that concerns all is told before any work
        for encoder in encoders:
            for arm in arms:
                config = _settings(settings, tasks[0], network, encoder).config(arm, shots[0], first_seed)
                check_needs(config, objectives.get(config.objective.name))
    combinations = [
        (_Combined(task, network, encoder), _settings(settings, task, network, encoder))
        for task in tasks
        for network in networks
        for encoder in encoders
    ]
    folder = user_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RunError(f"The benchmark's folder `{folder}` cannot be made: {problem.strerror or problem}.") from None
    with exclusive(folder):
        made = _begin(folder, arms, figures)
        done = {one.key for one in made.combinations if one.state == "done"}
        for parts, _ in combinations:
            if parts.combination.key not in done:
                made.put(parts.combination)
        unreadable: dict[str, str] = {}
        for number, (parts, own) in enumerate(combinations, start=1):
            one = parts.combination
            console.note(f"{number}/{len(combinations)}: {one.task}, {one.backbone}, {one.text}")
            made.put(one)
            try:
                if one.task not in unreadable:
                    unreadable[one.task] = _unreadable(own, arms[0], shots[0], first_seed)
                if why := unreadable[one.task]:
                    one = dataclasses.replace(one, state="skipped", reason=why)
                else:
                    compare(
                        own, arms, shots=shots, num_seeds=num_seeds, first_seed=first_seed, num_trials=num_trials,
                        protocol=protocol, controls=controls, out=str(made.path / one.folder),
                    )  # fmt: skip
                    one = dataclasses.replace(one, state="done")
            except (TesError, OSError, RuntimeError, MemoryError) as problem:  # PyTorch's own errors are RuntimeErrors
                why = one_line(problem)
                one = dataclasses.replace(one, state="failed", reason=why)
            if one.reason:
                console.warn(f"{one.task}, {one.backbone}, {one.text}: {one.reason}")
            made.put(one)
            _write(made)
    if not any(one.state == "done" for one in made.combinations):
        raise RunError(
            f"Nothing could be compared; `{made.path / 'benchmark.md'}` says why: {made.combinations[0].reason}"
        )
    return made


@dataclass(frozen=True)
class _Combined:
    task: _Part
    network: _Part
    encoder: _Part

    @property
    def combination(self) -> Combination:
        labels = (self.task.label, self.network.label, self.encoder.label)
        return Combination(*labels, f"{_slug(labels[0])}/{_slug(labels[1])}+{_slug(labels[2])}")


def _settings(settings: Settings, *parts: _Part) -> Settings:
    file = next((part.file for part in parts if part.file is not None), settings.file)
    flags = dict(settings.flags)
    for part in parts:
        flags |= part.flags
    return dataclasses.replace(settings, file=file, flags=flags)


def _backbone(spec: str) -> _Part:
    name, equals, checkpoint = spec.partition("=")
    if user_path(spec).suffix in (".yaml", ".yml"):
        return _Part(user_path(spec).stem, {}, user_path(spec))
    if equals and not (name and checkpoint):
        raise ConfigError(f"--backbones: `{spec}` is no backbone; write NAME, NAME=CHECKPOINT or a YAML file.")
    return _Part(spec, {"backbone.name": name} | ({"backbone.checkpoint": checkpoint} if equals else {}))


def _axis(name: str, parts: Sequence[_Part]) -> Sequence[_Part]:
    labels = [part.label for part in parts]
    if not parts:
        raise ConfigError(f"A benchmark needs at least one of its {name}.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"Two of the {name} are called `{twice[0]}` in the table; name each once, and differently.")
    return parts


def _begin(folder: Path, arms: list[str], published: dict[tuple[str, ...], float]) -> Benchmark:
    """Begin a benchmark in a folder, or go on with the one that is there: it only grows."""
    if (folder / "benchmark.json").is_file():
        made = Benchmark.open(folder)
        made.arms = list(dict.fromkeys([*made.arms, *arms]))
    elif any(entry.name != ".lock" for entry in folder.iterdir()):
        raise RunError(f"`{folder}` holds files that are not a benchmark; choose another --out.")
    else:
        made = Benchmark(folder, arms)
    made.published |= published
    try:
        made.save()
        write_json(folder / "env.json", environment())
    except OSError as problem:
        raise RunError(f"The benchmark's folder `{folder}` cannot be written: {problem.strerror or problem}.") from None
    return made


def _unreadable(settings: Settings, arm: str, shots: str, seed: int) -> str:
    """Return why a task's data cannot be used; an empty string where they can."""
    try:
        with console.quiet():
            data.open_dataset(settings.config(arm, shots, seed).data)
    except DataError as problem:
        return str(problem)
    return ""


def _write(made: Benchmark) -> None:
    write_tables(made)
    write_atomic(made.path / "benchmark.html", benchmark_page(made))


def _slug(label: str) -> str:
    slug = re.sub(r"[^\w@.=-]+", "_", label)
    return slug if slug == label else f"{slug[:60]}-{sha256_text(label)[:8]}"
