"""The command line: verbs parse, call one function each, and print. Heavy imports happen inside the verbs.

Exit codes: 0 done, 1 a bug of ours, 2 the user's input or environment, 75 interrupted and resumable, 130 interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tes import __version__
from tes.errors import ConfigError, Interrupted, TesError, counted

app = typer.Typer(
    name="tes",
    help="Fine-tune a pre-trained vision model on your labelled images, with the class names' text as supervision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Kind(StrEnum):
    """What `tes list` lists."""

    backbones = "backbones"
    objectives = "objectives"
    encoders = "encoders"
    sources = "sources"
    tasks = "tasks"
    settings = "settings"


Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of class folders, a CSV (path,label[,split][,group]), a task (`tes list tasks`), or hf:NAME.",
    ),
]
DataRoot = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where tasks' data sets are, in official layouts; default: $TES_DATA, else data."),
]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a part of a task's official list.")]
Classes = Annotated[
    str | None, typer.Option(metavar="FILE", help="Names, descriptions or prompts per class (JSON, YAML, CSV).")
]
OnlyClasses = Annotated[
    str | None,
    typer.Option(metavar="A,B,C", help='Keep these classes alone ("A, B" in quotes is one); or a file, one a line.'),
]
Text = Annotated[
    str | None,
    typer.Option("--text", help="minilm, bert:ID, clip:ID, st:ID, openclip:ID, file:PATH (ID: Hub name or folder)."),
]
BackboneName = Annotated[str | None, typer.Option(help="lite0, a timm name, or package.module:factory.")]
RunBackbone = Annotated[
    str | None,
    typer.Option(
        help="The run's own module, repeated: package.module:factory is not imported on a folder's word. Nor are"
        " weights fetched from the Hub: where the pre-trained network is needed, repeat its name."
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="Local weights (.safetensors, .pth), or a run folder.")
]
Shots = Annotated[str | None, typer.Option(metavar="K", help="Training images per class, drawn by --seed; or `all`.")]
Fraction = Annotated[float | None, typer.Option(help="Share of each class's training images, in place of --shots.")]
Size = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
Train = Annotated[
    str | None, typer.Option(help="head (solved in seconds), last-N (layers) or all; default: all on a GPU.")
]
LearningRate = Annotated[
    float | None, typer.Option(help="Learning rate of the backbone, and of the head unless that has its own.")
]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training images.")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16.")]
Arms = Annotated[str, typer.Option(help=r"NAME\[@PRESET][+START], as in ce,tes,tes@paper+random.")]
ShotsList = Annotated[str, typer.Option(metavar="K,K,…", help="As in 1,2,4,8,16; `all`; or shares: 15%.")]
FirstSeed = Annotated[int, typer.Option(help="The first seed.")]
Controls = Annotated[
    bool, typer.Option("--controls/--no-controls", help="Add the arms that tell where a gain comes from.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best there is.")]
Seed = Annotated[int | None, typer.Option(help="Draws the shots, the initialisation and the order.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML; flags override it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Any setting by its key; overrides flags. Repeatable."),
]
Protocol = Annotated[str, typer.Option(help="val; or paper: chosen on test, and labelled so.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Open and decide everything, print it, train nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
"""Read from the command line itself, in `main`: an error may come before any verb has been entered."""
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
WhereData = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="Where the run's images are: they are not opened on its word."),
]
WhereWeights = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="FILE", help="The pre-trained weights, if they came from a file; likewise."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `tes train` wrote.")]

SETTING_OF = {
    "data": "data.source",
    "data_root": "data.root",
    "partial": "data.partial",
    "classes": "data.classes",
    "only_classes": "data.only_classes",
    "shots": "data.shots",
    "fraction": "data.fraction",
    "objective": "objective",
    "start": "start",
    "train": "train",
    "backbone": "backbone.name",
    "checkpoint": "backbone.checkpoint",
    "text": "text.encoder",
    "size": "image.size",
    "lr": "optim.learning_rate",
    "batch_size": "optim.batch_size",
    "epochs": "optim.num_epochs",
    "precision": "precision",
    "refit": "refit",
    "seed": "seed",
    "device": "device",
    "workers": "num_workers",
    "out": "out",
}
"""A flag's parameter to the setting that it stands for."""


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="As for `tes check`; may stand in --config instead.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="tes, ce or another of `tes list objectives`; or NAME@PRESET, as in tes@paper."),
    ] = None,
    train: Train = None,
    start: Annotated[
        str | None, typer.Option(help="What the head starts from: auto, probe, probe+prior, prior, random.")
    ] = None,
    shots: Shots = None,
    fraction: Fraction = None,
    data_root: DataRoot = None,
    partial: Partial = False,
    classes: Classes = None,
    only_classes: OnlyClasses = None,
    backbone: BackboneName = None,
    checkpoint: Checkpoint = None,
    text: Text = None,
    size: Size = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    precision: Precision = None,
    refit: Annotated[
        str | None, typer.Option(help="Retrain before shipping on none, trainval or all; default: auto.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    against: Annotated[
        str | None, typer.Option(help="ce: with --train all, train that too and compare on val.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default: runs/<data>-<arm>-<n>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or with the last one; else begin it.")
    ] = False,
    protocol: Protocol = "val",
    dry_run: DryRun = False,
    config: ConfigFile = None,
    assignments: Assignments = None,
    debug: Debug = False,
) -> None:
    """Fine-tune on a folder or CSV of images; writes a run folder with the model, predictions and metrics."""
    flags = _flags(locals())
    from tes.config import load_config

    settings = load_config(config, flags, assignments or [])
    from tes.verbs.train import dry_run as settle_only
    from tes.verbs.train import train as train_run

    if against not in (None, "ce"):
        raise ConfigError(f"--against is ce (got `{against}`); `tes compare` takes any arms.")
    if dry_run:
        print(settle_only(settings, protocol=protocol).to_yaml(), end="")
        return
    try:
        run = train_run(
            settings, overwrite=overwrite, resume=resume, against=True if against else None, protocol=protocol
        )
    except Interrupted as stopped:
        print(f"interrupted; this goes on from here:\n  {_goes_on(settings, *stopped.args)}", file=sys.stderr)
        raise typer.Exit(75) from None
    except KeyboardInterrupt:
        if not resume:
            raise
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(75) from None
    print(_metrics_table(run.metrics, run.primary_metric))
    if protocol == "paper":
        print("test-selected: trained on train and val, and chosen on test, as the authors' code does")
    print(f"\nrun folder: {run.path}")
    own = f" --backbone {settings.backbone.name}" if ":" in settings.backbone.name else ""
    print("next:")
    print(f"  tes predict {run.path} PHOTO_OR_FOLDER{own}   # classify new images, no text needed")
    print(f"  tes report {run.path}   # a page with all of this, and the labels that the model doubts")
    print(f"  tes evaluate {run.path} --data OTHER_FOLDER{own}   # score it on other labelled images")
    print(f"  {_comparison(settings, config, assignments)}   # does text help?")


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    data: Annotated[
        str | None, typer.Option(help="Score other labelled images: a folder, CSV or task; classes go by name.")
    ] = None,
    data_root: DataRoot = None,
    partial: Partial = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave out images of --data whose class the model does not know.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for predictions.npz, per_class.csv and confusion.csv.")
    ] = None,
    backbone: RunBackbone = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a run's metrics: of its saved predictions, or on another labelled data set."""
    from tes.verbs.evaluate import evaluate as evaluate_run

    result = evaluate_run(
        run,
        split,
        data_source=data,
        data_root=data_root,
        partial=partial,
        backbone=backbone,
        ignore_unknown=ignore_unknown,
        out=out,
    )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(f"{result.get('data', result['split'])}: {counted(result['num_samples'], 'image')}")
        for note in result.get("notes", ()):
            print(note, file=sys.stderr)
        calibrated = {f"{head}/T": figures for head, figures in result.get("calibrated", {}).items()}
        print(_metrics_table({result["split"]: result["heads"] | calibrated}, result["metric"]))


@app.command()
def predict(
    run: RunFolder,
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files and folders.")],
    backbone: RunBackbone = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Classify images: CSV rows path,label,prob,top5,reason,name; a file that cannot be read has the reason alone."""
    from tes.verbs.predict import Classifier, image_files

    classifier = Classifier.from_run(run, backbone=backbone)
    files = image_files(paths)
    failed = 0
    rows = []
    table = csv.writer(sys.stdout, lineterminator="\n")
    if not as_json:
        table.writerow(["path", "label", "prob", "top5", "reason", "name"])
    for row in classifier.predict(files):
        failed += row.reason is not None
        if as_json:
            rows.append(dataclasses.asdict(row))
        else:
            top5 = "; ".join(f"{label} {prob:.4f}" for label, prob in row.top5)
            prob = "" if row.prob is None else f"{row.prob:.4f}"
            table.writerow([row.path, row.label, prob, top5, row.reason or "", row.name])
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    if failed:
        print(f"{failed} of {len(files)} files could not be read", file=sys.stderr)


@app.command()
def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; two seeds of ce tell most.")],
    data: WhereData = None,
    data_root: DataRoot = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Embeds the class names for runs without a text head.")
    ] = None,
    backbone: RunBackbone = None,
    checkpoint: WhereWeights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for diagnosis.{json,svg}; default: the first run.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Did fine-tuning stay near what the pre-trained model induces, or move towards the text? The paper's claim."""
    from tes.diagnosis import render
    from tes.verbs.diagnose import diagnose as diagnose_runs

    result = diagnose_runs(
        runs,
        data_source=data,
        data_root=data_root,
        text_encoder=text,
        backbone=backbone,
        checkpoint=checkpoint,
        out=out,
    )
    print(json.dumps(result, ensure_ascii=False) if as_json else render(result))


@app.command()
def average(
    run: RunFolder,
    data: WhereData = None,
    data_root: DataRoot = None,
    backbone: RunBackbone = None,
    checkpoint: WhereWeights = None,
    out: Annotated[str | None, typer.Option(help="The new run; default: runs/<data>-<arm>-averaged-<n>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    debug: Debug = False,
) -> None:
    """Average a run's weights with those it started from (WiSE-FT), as far as val says; writes a new run folder."""
    from tes.verbs.average import average as average_run
    from tes.verbs.average import render

    averaged = average_run(
        run,
        out=out,
        overwrite=overwrite,
        data_source=data,
        data_root=data_root,
        backbone=backbone,
        checkpoint=checkpoint,
    )
    print(render(averaged))
    print(_metrics_table(averaged.metrics, averaged.primary_metric))
    print(f"\nrun folder: {averaged.path}")


@app.command()
def calibrate(
    run: RunFolder,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit temperatures (and the text head's weight) to val, so that probabilities mean what they say."""
    from tes.verbs.calibrate import calibrate as calibrate_run
    from tes.verbs.calibrate import render

    result = calibrate_run(run)
    print(json.dumps(result, ensure_ascii=False) if as_json else render(result))


@app.command()
def verify(
    run: RunFolder,
    data: WhereData = None,
    data_root: DataRoot = None,
    backbone: RunBackbone = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Does a run hold? Recompute its metrics from its predictions and, with --data, those from its model."""
    from tes.verbs.verify import render
    from tes.verbs.verify import verify as verify_run

    result = verify_run(run, data_source=data, data_root=data_root, backbone=backbone)
    print(json.dumps(result, ensure_ascii=False) if as_json else render(result))
    if not result["holds"]:
        raise typer.Exit(2)


@app.command()
def text(
    data: Data,
    data_root: DataRoot = None,
    partial: Partial = False,
    classes: Classes = None,
    only_classes: OnlyClasses = None,
    text: Text = None,
    names_only: Annotated[bool, typer.Option("--names-only", help="Look at the text alone, at no image.")] = False,
    backbone: BackboneName = None,
    checkpoint: Checkpoint = None,
    size: Size = None,
    seed: Seed = None,
    device: Device = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what the class names are worth: prompts, neighbours, duplicates, and how well they classify unseen images.

    The images (at most 2,000, for the zero-shot accuracy) come from train and val, never from test.
    """
    flags = _flags(locals())
    from tes.config import load_config

    settings = load_config(config, flags, assignments or [])
    from tes import text as text_room
    from tes.verbs.text import describe_text

    report = describe_text(settings, images=not names_only)
    print(json.dumps(report, ensure_ascii=False) if as_json else text_room.render(report))


@app.command()
def check(
    data: Data,
    data_root: DataRoot = None,
    partial: Partial = False,
    classes: Classes = None,
    only_classes: OnlyClasses = None,
    shots: Shots = None,
    fraction: Fraction = None,
    objective: Annotated[str | None, typer.Option(help="As for `tes train`.")] = None,
    backbone: BackboneName = None,
    checkpoint: Checkpoint = None,
    text: Text = None,
    size: Size = None,
    seed: Seed = None,
    device: Device = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for bad_images.csv and duplicates.csv; default: the one you are in.")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Do everything but the training: counts, imbalance, bad images, duplicates, class texts, one batch forward.

    Bad images and (near) duplicates are listed in full in bad_images.csv and duplicates.csv, if there are any.
    """
    flags = _flags(locals(), but=("out",))
    from tes.config import load_config

    settings = load_config(config, flags, assignments or [])
    from tes.verbs.check import check as check_data
    from tes.verbs.check import render

    if out is None and not Path().resolve().is_relative_to(Path(settings.data.source).resolve()):
        out = "."  # among the images nothing is written unasked
    result = check_data(settings, out=out)
    print(json.dumps(result, ensure_ascii=False) if as_json else render(result))


@app.command()
def compare(
    data: Data,
    arms: Arms = "ce,tes",
    shots: ShotsList = "all",
    seeds: Annotated[int, typer.Option(help="How many seeds; ten are seconds with --train head.")] = 3,
    seed: FirstSeed = 0,
    trials: Annotated[int, typer.Option(help="Of a random search, as many for every arm; 1: the defaults.")] = 1,
    split: Annotated[str, typer.Option(help="test; or val, for designing defaults: test is never opened.")] = "test",
    protocol: Protocol = "val",
    controls: Controls = True,
    train: Train = None,
    data_root: DataRoot = None,
    partial: Partial = False,
    classes: Classes = None,
    only_classes: OnlyClasses = None,
    backbone: BackboneName = None,
    checkpoint: Checkpoint = None,
    text: Text = None,
    size: Size = None,
    lr: LearningRate = None,
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    precision: Precision = None,
    device: Device = None,
    out: Annotated[str | None, typer.Option(help="The comparison's folder; default: runs/<data>-compare.")] = None,
    dry_run: DryRun = False,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Does text help on your data? Arms from the same splits and seeds, with statistics and a sentence for each."""
    flags = _flags(locals(), but=("shots", "seed", "out"))
    from tes.comparison import render
    from tes.verbs.compare import Settings
    from tes.verbs.compare import compare as run_compare

    try:
        comparison = run_compare(
            Settings(config, flags, assignments or []),
            _listed(arms),
            shots=_listed(shots),
            num_seeds=seeds,
            first_seed=seed,
            num_trials=trials,
            split=split,
            protocol=protocol,
            controls=controls,
            out=out,
            dry_run=dry_run,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(75) from None
    if dry_run:
        from tes.comparison import render_plan

        print(render_plan(comparison.plan))
        return
    print(json.dumps(comparison.summary, ensure_ascii=False) if as_json else render(comparison.summary))
    if not as_json:
        print(f"\ncomparison: {comparison.path} (table.csv, summary.json, and a run folder for each cell)")
        print(f"next: tes report {comparison.path}")


@app.command()
def benchmark(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Data sets, each as for `tes compare`.")],
    out: Annotated[str, typer.Option(help="The benchmark's folder.")],
    backbones: Annotated[
        str, typer.Option(metavar="A,B", help="Names, NAME=CHECKPOINT, or YAML files with a backbone's settings.")
    ] = "lite0",
    texts: Annotated[str, typer.Option(metavar="X,Y", help="Text encoders, each as for --text.")] = "minilm",
    arms: Arms = "ce,tes",
    shots: ShotsList = "all",
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    seed: FirstSeed = 0,
    trials: Annotated[int, typer.Option(help="Of a search in each comparison; 1: the defaults.")] = 1,
    protocol: Protocol = "val",
    controls: Controls = True,
    train: Train = None,
    size: Size = None,
    device: Device = None,
    data_root: DataRoot = None,
    partial: Partial = False,
    published: Annotated[
        str | None, typer.Option(metavar="FILE", help="benchmark.csv with its column published_percent filled.")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    debug: Debug = False,
) -> None:
    """Tasks × backbones × text encoders × arms as one resumable set of comparisons, and one table over all of them."""
    flags = _flags(locals(), but=("data", "shots", "seed", "out"))
    from tes.benchmark_folder import render
    from tes.verbs.benchmark import benchmark as run_benchmark
    from tes.verbs.compare import Settings

    try:
        made = run_benchmark(
            Settings(config, flags, assignments or []),
            data,
            _listed(backbones),
            _listed(texts),
            _listed(arms),
            out=out,
            shots=_listed(shots),
            num_seeds=seeds,
            first_seed=seed,
            num_trials=trials,
            protocol=protocol,
            controls=controls,
            published=published,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(75) from None
    print(render(made))
    print(
        f"\nbenchmark: {made.path} (benchmark.md, benchmark.csv, benchmark.html, and a comparison for each combination)"
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN|COMPARISON", help="What `tes train` or `tes compare` wrote.")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="The page; default: report.html in the folder.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The photos, for more pictures than the folder keeps.")] = None,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Write a page to look at and to send on: one HTML file, no network; and a run's doubted labels as CSV."""
    from tes.verbs.report import report as write_report

    print(f"report: {write_report(folder, out=out, data=data, data_root=data_root)}")


@app.command()
def download(
    task: Annotated[str, typer.Argument(help="A task, see `tes list tasks`.")],
    data_root: DataRoot = None,
    source: Annotated[
        str | None, typer.Option("--from", help="publisher or hub; default: the publisher, if it can.")
    ] = None,
    partial: Partial = False,
    debug: Debug = False,
) -> None:
    """Fetch a task's images: verified, continued where it broke off, nothing half unpacked."""
    from tes.verbs.download import download as download_task

    if source not in (None, "publisher", "hub"):
        raise ConfigError(f"--from is publisher or hub (got `{source}`).")
    print(f"{task}: {download_task(task, data_root, source, partial=partial)}")


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: AsJson = False) -> None:
    """List what can be chosen by name."""
    from tes.catalogue import available, tasks

    if kind is Kind.tasks:
        rows = tasks()
        lines = [
            f"{row['name']:12}{row['num_classes']:>4} classes  {row['metric']:16}"
            + " / ".join(f"{number} {split}" for split, number in row["splits"].items())
            for row in rows
        ]
        print(json.dumps(rows) if as_json else "\n".join(lines))
        return
    names = available(kind.value)
    print(json.dumps(names) if as_json else "\n".join(names))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the images and runs go.")] = Path("tes-demo"),
    debug: Debug = False,
) -> None:
    """Run the whole job on images drawn by code: no download, no network, under two minutes on two cores."""
    from tes.verbs.demo import demo as run_demo

    print(run_demo(out))


def main() -> None:
    """Run the command line; turn every error into one sentence and an exit code."""
    debug = "--debug" in sys.argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8; in JSON this is the escape
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # the command-line parser has caught Ctrl-C and returns this
            raise KeyboardInterrupt
    except typer.Exit as left:
        code = left.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except BrokenPipeError:  # `tes predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except TesError as problem:
        if debug:
            raise
        code = _fail(f"error: {problem}", 2)
    except OSError as problem:
        if debug:
            raise
        where = f" ({problem.filename})" if problem.filename else ""
        code = _fail(f"error: {problem.strerror or problem}{where}", 2)
    except Exception as problem:
        if hasattr(problem, "format_message"):  # how the command-line parser says that a flag is wrong
            message = " ".join(problem.format_message().split())  # empty where it has shown the help instead
            code = _fail(f"error: {message.rstrip('.')}. Try `tes --help`.", 2) if message else 2
        elif debug:
            raise
        elif _is_out_of_memory(problem):
            code = _fail(
                "error: There is not enough memory for this; give it less at a time: a smaller `optim.batch_size`, or"
                " the same one in parts (`optim.accumulate`), a smaller --size, or a smaller --backbone.",
                2,
            )
        else:
            what = f"{type(problem).__name__}: {problem}"
            code = _fail(f"error: this is a bug in tes ({what}). Run again with --debug and report it.", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _is_out_of_memory(problem: Exception) -> bool:
    """Tell by PyTorch's names and words, since it is not imported here: for the CPU it has no class of its own."""
    is_gpu, is_cpu = type(problem).__name__ == "OutOfMemoryError", "can't allocate memory" in str(problem)
    return isinstance(problem, MemoryError) or is_gpu or is_cpu


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _flags(given: Mapping[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings that flags stand for, by key; None: not given.

    Args:
        given: A verb's parameters.
        but: Those that mean something else to this verb.
    """
    flags = {key: given[name] for name, key in SETTING_OF.items() if name in given and name not in but}
    if not flags.get("data.partial"):
        flags.pop("data.partial", None)
    if flags.get("data.shots") == "all":
        del flags["data.shots"]
    if (chosen := flags.get("data.only_classes")) is not None:
        flags["data.only_classes"] = [part.strip() for part in next(csv.reader([chosen], skipinitialspace=True), [])]
    return flags


def _comparison(settings: Any, config: Path | None, assignments: list[str] | None) -> str:
    """Return the `tes compare` that has a training's images, classes, network and settings."""
    from tes.config import load_config

    standard = load_config(flags={"data.source": settings.data.source})
    is_ours = settings.objective.name == "tes"
    arm = settings.arm if is_ours else "tes"
    words = ["tes", "compare", settings.data.source, "--arms", f"ce,{arm}", "--seeds", "10"]
    if settings.data.fraction:
        words += ["--shots", f"{100 * settings.data.fraction:g}%"]
    elif settings.data.shots is not None:
        words += ["--shots", settings.data.shots or 1]  # at 0 shots there is nothing to compare with
    # The arms say the objective and the start, --seeds the seeds, and a comparison has a folder of its own.
    own = ("objective", "start", "start_fallback", "refit", "seed", "out")
    for name, key in SETTING_OF.items():
        value = settings.value(key)
        if name not in ("data", "shots", "fraction", "workers", *own) and value != standard.value(key):
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(_row(value) if isinstance(value, tuple) else value)
    words += [] if config is None else ["--config", config]
    for text in assignments or ():
        key = text.partition("=")[0].strip()
        if key not in (*own, "objective.name", "objective.preset") and (is_ours or not key.startswith("objective.")):
            words += ["--set", text]
    return shlex.join(map(str, words))


def _goes_on(settings: Any, folder: Path) -> str:
    """Return the command that was given, as one that goes on with its run."""
    given = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    out = [] if settings.out else ["--out", str(folder)]
    return shlex.join(["tes", *given, *out, "--resume"])


def _row(cells: Sequence[str]) -> str:
    """Return names as a line of CSV, as `--only-classes` reads it."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _metrics_table(metrics: dict[str, Any], primary: str) -> str:
    from tes.metrics import LOSSES, ordered

    columns = ordered(primary)
    shown = [name for name in columns if any(name in heads[head] for heads in metrics.values() for head in heads)]
    width = max([8, *(len(head) + 2 for heads in metrics.values() for head in heads)])
    lines = [f"{'split':6}{'head':{width}}" + "".join(f"{name:>16}" for name in shown)]
    for split, heads in metrics.items():
        for head, figures in heads.items():
            cells = []
            for name in shown:
                value = figures.get(name)
                plain = name in LOSSES
                cells.append("-" if value is None else f"{value:.3f}" if plain else f"{value:.1%}")
            lines.append(f"{split:6}{head:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
