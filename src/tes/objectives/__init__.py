"""Objectives: what a batch of images should teach the network. One file each, on the contract of `base.py`."""

from tes.registry import Registry

objectives = Registry(
    "objective",
    {
        "bi_tuning": "tes.objectives.bi_tuning:BiTuning",
        "bss": "tes.objectives.bss:BatchSpectralShrinkage",
        "ce": "tes.objectives.ce:CrossEntropy",
        "co_tuning": "tes.objectives.co_tuning:CoTuning",
        "l2_sp": "tes.objectives.l2_sp:L2SP",
        "label_smoothing": "tes.objectives.label_smoothing:LabelSmoothing",
        "static_text": "tes.objectives.static_text:StaticText",
        "tes": "tes.objectives.tes:TextSupervised",
        "text_ce": "tes.objectives.text_ce:TextCrossEntropy",
    },
    "tes.objectives",
)
