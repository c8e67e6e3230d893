"""The job of `tes train`: the run folder is claimed first, and given back if anything is refused before the fit."""

from __future__ import annotations

import contextlib

from torch import nn

from tes import console
from tes.config import Config
from tes.errors import ConfigError, Interrupted, RunError
from tes.files import user_path
from tes.job import run_job
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.prepare import PROTOCOLS, Protocol, prepare
from tes.resume import recorded_settings, refuse_other, threads_of
from tes.run import Run, claim, is_unfinished, newest, refuse_out_among_images
from tes.settle import check_needs


def train(
    config: Config,
    *,
    network: nn.Module | None = None,
    overwrite: bool = False,
    resume: bool = False,
    against: bool | None = None,
    protocol: str = "val",
) -> Run:
    """Fine-tune on labelled images and return the finished run.

    Args:
        config: All settings; see `tes.load_config`.
        network: Your own pre-trained module, in place of one built from `config.backbone.name`.
        overwrite: Replace the run that stands in `config.out`.
        resume: Go on with the run in `config.out`, by default the last of `runs/<data>-<arm>-<n>`; one that is finished
            is returned as it is, and where there is none, it is begun.
        against: Train plain fine-tuning (`ce` from `probe`) as well and say on val how far this run is from it; None:
            where it takes seconds.
        protocol: `val`, or `paper`: trained on train and val, the best of the epochs on test is kept, and every figure
            is labelled test-selected.

    Raises:
        TesError: A sentence about the input or the environment; nothing is left half-written.
        Interrupted: By SIGINT or SIGTERM; `resume` goes on from there.
    """
    if overwrite and resume:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them.")
    config = _under(protocol, config, against)
    check_needs(config, objectives.get(config.objective.name))
    source = user_path(config.data.source)
    refuse_out_among_images(user_path(config.out or "runs"), source)
    stem = f"{source.resolve().stem}-{config.arm}"
    begun = newest(config.out, stem) if resume else None
    if begun is not None:
        refuse_other(config, begun, settled=False)
        if not is_unfinished(begun):
            finished = Run.open(begun)
            there, here = finished.summary.get("protocol"), PROTOCOLS[protocol]
            if there != here:
                raise RunError(
                    f"The run in `{begun}` is finished, under the protocol `{there}`, not `{here}`; choose another"
                    " --out."
                )
            of, now = recorded_settings(begun).data.source, config.data.source
            if user_path(of).resolve() != source.resolve():
                raise RunError(f"The run in `{begun}` is finished, on `{of}`, not `{now}`; choose another --out.")
            console.note(f"the run `{begun}` is finished already")
            return finished
    claimed = None
    try:
        with claim(config.out, stem, overwrite, begun) as claimed:
            loaded = Loaded.open(config, network)
            with contextlib.nullcontext() if begun is None else threads_of(begun):
                run_job(
                    config, loaded, claimed.path, protocol=Protocol(PROTOCOLS[protocol]), against=against,
                    goes_on=begun is not None, on_ready=claimed.keep,
                )  # fmt: skip
    except KeyboardInterrupt:
        if claimed is not None and is_unfinished(claimed.path):
            raise Interrupted(claimed.path) from None
        raise
    return Run.open(claimed.path)


def dry_run(config: Config, *, network: nn.Module | None = None, protocol: str = "val") -> Config:
    """Do what `train` does before it trains: open everything, decide everything, and say so. Nothing is written.

    Returns:
        The settings without a gap.

    Raises:
        TesError: What would stop the training.
    """
    config = _under(protocol, config, None)
    check_needs(config, objectives.get(config.objective.name))
    return prepare(config, Loaded.open(config, network), Protocol(PROTOCOLS[protocol])).config


def _under(protocol: str, config: Config, against: bool | None) -> Config:
    """Return the settings as a protocol wants them.

    Raises:
        ConfigError: There is no such protocol, or it does not go with the settings.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol is val or paper (got `{protocol}`).")
    if protocol == "val":
        return config
    if config.refit not in ("auto", "none"):
        raise ConfigError(f"--protocol paper trains on val already; leave `refit: {config.refit}` out.")
    if config.start_fallback != "none":
        raise ConfigError("--protocol paper leaves no val to choose on; leave `start_fallback` out.")
    if against:
        raise ConfigError("--protocol paper leaves no val to compare on; leave --against out, or use `tes compare`.")
    return config.replace({"refit": "none"})
