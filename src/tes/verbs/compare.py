"""Arms under equal conditions: the same splits, seeds and trials for all; each cell a run folder, never done twice."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tes import console, data
from tes.comparison import BASELINE, Comparison, Plan, cell_folder, read_plan, write_plan, write_results
from tes.config import PRIOR_STARTS, Config, arm_flags, load_config
from tes.engine.compute import Compute, resolve_device
from tes.errors import ConfigError, DataError, RunError, TesError, listing
from tes.files import remove_leftovers, sha256_text, user_path
from tes.job import run_job
from tes.loaded import Loaded
from tes.mistakes import often_wrong
from tes.objectives import objectives
from tes.objectives.base import Objective
from tes.prepare import PROTOCOLS, Protocol
from tes.resume import differences as differing
from tes.resume import lines, recorded_settings, threads_of
from tes.run import Run, exclusive, refuse_out_among_images
from tes.run_writer import Shared, write_thumbnails
from tes.settle import check_needs, settle
from tes.text.encoder import open_encoder
from tes.text.vocabulary import SharedSpace

OWN_KEYS = ("objective", "start", "seed", "out", "data.shots", "data.fraction", "refit", "checkpoint")
"""Settings that a comparison varies itself, or that have no place in one, or change no result."""


@dataclass(frozen=True)
class Settings:
    """What all arms share: as for `load_config`, from which every cell's settings are made."""

    file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()

    def config(self, arm: str, shots: str, seed: int) -> Config:
        """Return a cell's settings; those below `objective` go to the arms whose objective has them.

        Raises:
            ConfigError: The arm, the shots or another setting is wrong.
        """
        objective_class = _objective_class(arm)
        assignments = [line for line in self.assignments if _concerns(line, objective_class)]
        own = {**arm_flags(arm), **_subset(shots), "seed": seed, "refit": "none", "start_fallback": "none"}
        config = load_config(self.file, {**self.flags, **own}, assignments)
        name, _, preset = arm_flags(arm)["objective"].partition("@")
        varied = {
            "seed": (config.seed, seed),
            "data.shots": (config.data.shots, own.get("data.shots")),
            "data.fraction": (config.data.fraction, own.get("data.fraction")),
            "objective": ((config.objective.name, config.objective.preset), (name, preset or None)),
            "start": (config.start, own["start"]),
            "refit": (config.refit, "none"),
            "start_fallback": (config.start_fallback, "none"),
        }
        for key, (given, wanted) in varied.items():
            if given != wanted:
                raise ConfigError(
                    f"`{key}` is set by --set or --config, but a comparison decides it itself: leave it out, or use"
                    " --arms, --shots, --seed and --seeds."
                )
        return config


def compare(
    settings: Settings | Mapping[str, Any],
    arms: Sequence[str],
    *,
    shots: Sequence[str] = ("all",),
    num_seeds: int = 3,
    first_seed: int = 0,
    num_trials: int = 1,
    split: str = "test",
    protocol: str = "val",
    controls: bool = True,
    out: str | None = None,
    network: nn.Module | None = None,
    dry_run: bool = False,
) -> Comparison:
    """Train every arm at every number of shots from every seed, and return the comparison; see its `summary`.

    An interrupted comparison continues where it was when it is started again; finished cells are kept.

    Args:
        settings: What all arms share; a mapping of dotted keys will do.
        arms: `NAME[@PRESET][+START]`; `ce` is added where it is missing, and what credit needs.
        shots: Numbers, `all`, or shares such as `15%`.
        num_seeds: How many seeds.
        first_seed: From which one on.
        num_trials: Of the search, the same for every arm; 1: the defaults.
        split: `test`, or `val` for designing defaults: test is then never opened.
        protocol: `val`, or `paper`: chosen on test, and labelled so.
        controls: Add the arms that tell where a gain comes from; they cost as much as the others.
        out: The comparison's folder; None: `runs/<data>-compare`.
        network: Your own pre-trained module.
        dry_run: Decide everything and stop: the comparison that is returned has a plan, and neither cells nor a
            folder.

    Raises:
        TesError: A sentence about the input; or the folder holds a comparison with other settings.
    """
    if not isinstance(settings, Settings):
        settings = Settings(flags=settings)
    shots = [_spelled(shot) for shot in shots]
    check_axes(arms, shots, num_seeds, num_trials, split, protocol)
    _check_arms(settings, arms, shots[0], first_seed)
    first = settings.config(arms[0], shots[0], first_seed)
    source = user_path(first.data.source)
    folder = user_path(out) if out is not None else Path("runs") / f"{source.resolve().stem}-compare"
    refuse_out_among_images(folder, source)
    how = Protocol(PROTOCOLS[protocol], split, num_trials)
    seeds = range(first_seed, first_seed + num_seeds)
    if (folder / "compare.json").is_file():
        # A comparison only grows: to leave out an arm that was run would choose among results.
        begun = read_plan(folder)
        shots = [next((old for old in begun.shots if _spelled(old) == shot), shot) for shot in shots]
        arms, shots, seeds = (tuple(dict.fromkeys([*old, *new])) for old, new in (
            (begun.arms, arms), ((*begun.shots, *begun.skipped), shots), (begun.seeds, seeds)
        ))  # fmt: skip
    with console.quiet():
        loaded = Loaded.open(first, network)
    plan = _plan(settings, loaded, arms, shots, sorted(seeds), how, controls)
    for shot, why in plan.skipped.items():
        console.warn(f"{shot} shots are left out: {why}")
    if dry_run:
        return Comparison(folder, plan)
    _continue_or_start(folder, plan)
    cells = plan.cells()
    _refuse_other_rates(settings, loaded, plan, folder)
    scored = _Scored(settings, loaded, how)
    missing = [cell for cell in cells if not _is_done(cell_folder(folder, *cell), scored, *cell)]
    if missing and len(missing) < len(cells):
        console.note(f"{len(cells) - len(missing)} of {len(cells)} cells are done already")
    if missing:
        _warm_up(settings, loaded, plan, missing)
        _run_cells(settings, loaded, plan, missing, folder, how)
    comparison = Comparison(folder, plan)
    if missing or not (folder / "shared" / "thumbnails").is_dir():
        _keep_thumbnails(comparison, loaded)
    write_results(comparison)
    return comparison


def _check_arms(settings: Settings, arms: Sequence[str], shots: str, seed: int) -> None:
    """Refuse settings that no arm has, and arms that cannot be trained so, before anything is loaded.

    Raises:
        ConfigError: One sentence.
    """
    named = [_objective_class(arm) for arm in arms]
    for line in settings.assignments:
        if not any(_concerns(line, objective_class) for objective_class in named):
            raise ConfigError(f"`--set {line}`: no arm's objective has this setting.")
    for arm in arms:
        config = settings.config(arm, shots, seed)
        check_needs(config, objectives.get(config.objective.name))


def _run_cells(
    settings: Settings,
    loaded: Loaded,
    plan: Plan,
    missing: Sequence[tuple[str, int, str]],
    folder: Path,
    how: Protocol,
) -> None:
    """Train the cells that are missing, each in a folder of its own; one that was interrupted goes on."""
    shared, store, shared_by = Shared(folder / "shared"), {}, None
    label = f"{len(plan.arms) + len(plan.added)} arms"
    with exclusive(folder), console.quiet(), console.progress(len(missing), label, "cells") as progress:
        for shots, seed, arm in missing:
            if shared_by != (shots, seed):  # what arms share depends on the images, so no later cell can use it
                store, shared_by = {}, (shots, seed)
            cell = cell_folder(folder, shots, seed, arm)
            goes_on = any(cell.glob("state/*.safetensors"))
            if not goes_on:
                shutil.rmtree(cell, ignore_errors=True)
                cell.mkdir(parents=True)
            config = settings.config(arm, shots, seed)
            remove_leftovers(cell)
            with threads_of(cell) if goes_on else contextlib.nullcontext():
                run_job(config, loaded, cell, protocol=how, store=store, shared=shared, against=False, goes_on=goes_on)
            progress.advance(1)


def _keep_thumbnails(comparison: Comparison, loaded: Loaded) -> None:
    plan = comparison.plan
    # At the most shots: those mistakes are the ones that more labels do not cure.
    runs = [comparison.run(plan.shots[-1], seed, arm) for seed in plan.seeds for arm in plan.arms]
    wanted = often_wrong((run.predictions(plan.split), run.summary["default_head"]) for run in runs)
    folder = comparison.path / "shared" / "thumbnails"
    write_thumbnails(folder, loaded.dataset, wanted, with_test=plan.split == "test")


def _refuse_other_rates(settings: Settings, loaded: Loaded, plan: Plan, folder: Path) -> None:
    """Refuse to go on with cells that were trained at a default learning rate of former days.

    Raises:
        RunError: There is such a cell; a search chooses its own rates, and is not asked.
    """
    for shots in plan.shots if plan.num_trials == 1 else ():
        cells = ((shots, seed, arm) for seed in plan.seeds for arm in (*plan.arms, *plan.added))
        done = next((cell for cell in cells if (cell_folder(folder, *cell) / "run.json").is_file()), None)
        if done is None:
            continue
        with contextlib.suppress(TesError):  # a damaged cell is done again
            there = recorded_settings(cell_folder(folder, *done)).optim.learning_rate
            here = _settled(settings, loaded, done[2], shots, done[1]).optim.learning_rate
            if there != here:
                break
    else:
        return
    raise RunError(
        f"The cells at `{shots}` shots in `{folder}` were trained at the learning rate {there}, the default of that"
        f" day, which is {here} now; choose another --out."
    )


class _Scored:
    """Which images a cell is to be scored on, where that is not simply the test split."""

    def __init__(self, settings: Settings, loaded: Loaded, how: Protocol) -> None:
        self.settings, self.loaded, self.how = settings, loaded, how
        self.known: dict[tuple[str, int], set[str]] = {}

    def paths(self, shots: str, seed: int, arm: str) -> set[str]:
        """Return their paths."""
        if (shots, seed) not in self.known:
            config = self.settings.config(arm, shots, seed)
            dataset = data.draw(self.loaded.dataset, config.data, seed)
            indices = self.how.scored(dataset, config.data).get(self.how.split, ())
            self.known[shots, seed] = {dataset.paths[index] for index in indices}
        return self.known[shots, seed]


def _is_done(cell: Path, scored: _Scored, shots: str, seed: int, arm: str) -> bool:
    """Whether a cell is finished and whole, and scored on the images that it is to be; else it is done again."""
    split = scored.how.split
    if not (cell / "run.json").is_file():
        return False
    try:
        run = Run.open(cell)
        run.metrics[split][run.summary["default_head"]]
        predictions = run.predictions(split)
        if split == "val":
            lost = {row.get("path") for row in run.summary.get("lost", ())}
            if set(predictions.paths) | lost != scored.paths(shots, seed, arm) | lost:
                console.warn(f"the cell `{cell}` was scored on other images, and is done again")
                return False
        whole = all(run.file(name).is_file() for name in run.summary.get("shared") or ())
    except (TesError, KeyError, TypeError):
        whole = False
    if not whole:
        console.warn(f"the cell `{cell}` is damaged and is done again")
    return whole


def _objective_class(arm: str) -> type[Objective]:
    return objectives.get(arm.partition("+")[0].partition("@")[0])


def _concerns(assignment: str, objective_class: type[Objective]) -> bool:
    prefix, _, name = assignment.partition("=")[0].strip().partition(".")
    return prefix != "objective" or not name or name in objective_class.Config.model_fields


def check_axes(
    arms: Sequence[str], shots: Sequence[str], num_seeds: int, num_trials: int, split: str, protocol: str
) -> None:
    """Refuse arms, shots and numbers that no comparison can have.

    Raises:
        ConfigError: One sentence.
    """
    if not arms:
        raise ConfigError("--arms names no arm; write them as in `--arms ce,tes`.")
    for arm in arms:
        if arm.endswith(("+", "@")) or not arm.strip():
            raise ConfigError(f"`{arm}` is no arm; write NAME[@PRESET][+START], as in `tes@paper+random`.")
    if len(set(arms)) < len(arms):
        raise ConfigError(f"--arms names an arm twice: {','.join(arms)}.")
    if "0" in shots:
        raise ConfigError("At 0 shots there is no `ce` to compare with; `tes train --shots 0` scores the text prior.")
    if not shots or len(set(shots)) < len(shots):
        raise ConfigError("--shots must name each number once, as in `--shots 1,2,4,all`.")
    for value, name in ((num_seeds, "--seeds"), (num_trials, "--trials")):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1 (got {value}).")
    if split not in ("val", "test"):
        raise ConfigError(f"--split is val or test (got `{split}`).")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol is val or paper (got `{protocol}`).")
    if protocol == "paper" and split == "val":
        raise ConfigError("--protocol paper chooses on the test split; it has no --split val.")
    for shot in shots:
        _subset(shot)


def _spelled(shots: str) -> str:
    """Return shots as tables have them: a share of everything is everything, and no seed draws from that."""
    if shots.isdecimal():
        return str(int(shots))
    return "all" if _subset(shots).get("data.fraction") == 1 else shots


def _subset(shots: str) -> dict[str, Any]:
    if shots == "all":
        return {}
    if shots.endswith("%"):
        try:
            return {"data.fraction": float(shots.removesuffix("%")) / 100}
        except ValueError:
            pass
    elif shots.isdecimal():
        return {"data.shots": int(shots)}
    raise ConfigError(f"--shots: `{shots}` is neither a number, nor `all`, nor a share such as `15%`.")


def _plan(
    settings: Settings,
    loaded: Loaded,
    arms: Sequence[str],
    shots: Sequence[str],
    seeds: Sequence[int],
    how: Protocol,
    controls: bool,
) -> Plan:
    kept, skipped = [], {}
    for shot in shots:
        config = settings.config(arms[0], shot, seeds[0])
        try:
            dataset = data.draw(loaded.dataset, config.data, seeds[0])
        except DataError as problem:
            skipped[shot] = str(problem)
            continue
        if how.split in how.scored(dataset, config.data):
            kept.append(shot)
        else:
            skipped[shot] = f"no image is left to score ({how.split})"
    if not kept:
        raise DataError(f"No number of shots can be drawn and scored: {listing(list(skipped.values()), 1)}")
    starts = {arm: _start(settings, loaded, arm, kept[0], seeds[0]) for arm in arms}
    added = [] if BASELINE in arms else [BASELINE]
    for start in dict.fromkeys(starts.values() if controls else ()):
        wanted = [] if start == "probe" else [start]
        if start in PRIOR_STARTS:
            wanted = ["probe+prior", "probe+lookup", "probe+permuted"] + ([start] if start == "prior" else [])
            if isinstance(loaded.source_text(settings.config(arms[0], kept[0], seeds[0]).text), SharedSpace):
                wanted.remove("probe+lookup")  # a CLIP has no source classes to copy from
        added += [arm for name in wanted if (arm := f"{BASELINE}+{name}") not in arms and arm not in added]
    starts |= {arm: _start(settings, loaded, arm, kept[0], seeds[0]) for arm in added}
    everyone = (*arms, *added)
    return Plan(
        arms=tuple(arms),
        added=tuple(added),
        shots=tuple(kept),
        seeds=tuple(seeds),
        single=tuple(arm for arm in everyone if _is_single(settings.config(arm, "all", 0), starts[arm])),
        starts=starts,
        protocol=how.name,
        split=how.split,
        num_trials=how.num_trials,
        settings=_common(settings.config(BASELINE, "all", 0)) | _inputs(settings, loaded, kept[0], seeds[0]),
        objectives={arm: settings.config(arm, "all", 0).objective.model_dump(mode="json") for arm in everyone},
        skipped=skipped,
    )


def _inputs(settings: Settings, loaded: Loaded, shots: str, seed: int) -> dict[str, Any]:
    """Return what the settings only name: the content behind it, and what was decided for this machine."""
    dataset, config = loaded.dataset, settings.config(BASELINE, shots, seed)
    images = sorted(zip(dataset.paths, dataset.labels.tolist(), dataset.splits.tolist(), dataset.sha1s))
    settled = _settled(settings, loaded, BASELINE, shots, seed)
    return {
        "images": sha256_text(repr(images)),
        "classes": sha256_text(repr(dataset.classes)),
        "weights": loaded.backbone.fingerprint,
        "text rows": open_encoder(config.text).fingerprint,
        "decided": {key: getattr(settled, key) for key in ("train", "device", "precision", "memory_format")}
        | {"fit": settled.image.fit},
    }


def _start(settings: Settings, loaded: Loaded, arm: str, shots: str, seed: int) -> str:
    start = _settled(settings, loaded, arm, shots, seed).start
    assert start is not None
    return start


def _settled(settings: Settings, loaded: Loaded, arm: str, shots: str, seed: int) -> Config:
    config = settings.config(arm, shots, seed)
    objective_class = objectives.get(config.objective.name)
    dataset = data.draw(loaded.dataset, config.data, seed)
    return settle(config, dataset, loaded.backbone, objective_class, loaded.source_text).config


def _is_single(config: Config, start: str) -> bool:
    """Whether nothing in an arm depends on the seed where none draws images."""
    solved = config.train == "head" or (config.train == "auto" and resolve_device(config.device)[0] == "cpu")
    return solved and not objectives.get(config.objective.name).is_seeded and start != "probe+permuted"


def _common(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for key in OWN_KEYS:
        branch = tree
        *parents, last = key.split(".")
        for parent in parents:
            branch = branch[parent]
        branch.pop(last, None)
    return tree


def _continue_or_start(folder: Path, plan: Plan) -> None:
    """Make the folder, or accept it as the beginning of this very comparison.

    Raises:
        RunError: It cannot be made, holds something else, or was begun with other settings.
    """
    if (folder / "compare.json").is_file():
        begun = read_plan(folder)
        names = ("settings", "protocol", "split", "num_trials")
        # A record that is older than a setting stands for its default.
        common = _common(load_config(flags={"data.source": "", "objective": BASELINE}))
        default = {"settings": common | {"decided": {"fit": "crop"}}}
        warmups = [settings.get("optim", {}).get("warmup") for settings in (begun.settings, plan.settings)]
        if warmups == [0.0, None] and plan.settings["decided"]["train"] == "head":
            begun.settings["optim"]["warmup"] = None  # its default before it was open, and nothing is stepped
        found = {
            key: pair
            for name in names
            for key, pair in differing(getattr(begun, name), getattr(plan, name), default.get(name), name).items()
        }
        for arm in plan.objectives.keys() & begun.objectives.keys():
            standard = objectives.get(plan.objectives[arm]["name"]).Config().model_dump(mode="json")
            found |= differing(begun.objectives[arm], plan.objectives[arm], standard, f"objective of {arm}")
        differences = [line.removeprefix("settings.") for line in lines(found)]
        differences += [
            f"start of {arm}: {begun.starts[arm]} there, {plan.starts[arm]} here"
            for arm in plan.starts
            if arm in begun.starts and begun.starts[arm] != plan.starts[arm]
        ]
        if differences:
            raise RunError(
                f"The comparison in `{folder}` was begun with other settings ({listing(differences)}); repeat those to"
                " continue it, or choose another --out."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"`{folder}` holds files that are not a comparison; choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(f"`{folder}` is a file")
        with exclusive(folder):
            (folder / "summary.json").unlink(missing_ok=True)  # it is written last, and stands for being finished
            write_plan(folder, plan)
    except OSError as problem:
        raise RunError(f"The comparison's folder `{folder}` cannot be made: {problem.strerror or problem}.") from None


def _warm_up(settings: Settings, loaded: Loaded, plan: Plan, missing: Sequence[tuple[str, int, str]]) -> None:
    """Compute the features that the cells will ask for, under a progress bar of its own."""
    cell = next((cell for cell in missing if plan.starts[cell[2]] != "random"), None)
    if cell is None:
        return
    shots, seed, arm = cell
    config = _settled(settings, loaded, arm, shots, seed)
    is_solved = config.train == "head"
    if not is_solved and plan.shots != ("all",):
        return  # few images, and each run only passes its own
    wanted = np.ones(len(loaded.dataset.paths), dtype=bool)
    if plan.split == "val" or not is_solved:
        wanted = loaded.dataset.splits != "test"
    compute = Compute(config.device, config.precision, config.memory_format, config.num_workers or 0)
    loaded.features(compute).readable(np.flatnonzero(wanted))
