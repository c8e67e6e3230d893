"""The job of `tes train`: the run folder is claimed first, and given back if anything is refused before the fit."""

from __future__ import annotations

from torch import nn

from tes.config import Config
from tes.files import user_path
from tes.job import run_job
from tes.loaded import Loaded
from tes.objectives import objectives
from tes.run import Run, claim, refuse_out_among_images
from tes.settle import check_needs


def train(
    config: Config, *, network: nn.Module | None = None, overwrite: bool = False, against: bool | None = None
) -> Run:
    """Fine-tune on labelled images and return the finished run.

    Args:
        config: All settings; see `tes.load_config`.
        network: Your own pre-trained module, in place of one built from `config.backbone.name`.
        overwrite: Replace the run that stands in `config.out`.
        against: Train plain fine-tuning (`ce` from `probe`) as well and say on val how far this run is from it; None:
            where it takes seconds.

    Raises:
        TesError: A sentence about the input or the environment; nothing is left half-written.
    """
    check_needs(config, objectives.get(config.objective.name))
    source = user_path(config.data.source)
    refuse_out_among_images(user_path(config.out or "runs"), source)
    with claim(config.out, f"{source.resolve().stem}-{config.arm}", overwrite) as claimed:
        run_job(config, Loaded.open(config, network), claimed.path, against=against, on_ready=claimed.keep)
    return Run.open(claimed.path)
