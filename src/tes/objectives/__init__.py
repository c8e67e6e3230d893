"""Objectives: what a batch of images should teach the network. One file each, on the contract of `base.py`."""

from tes.registry import Registry

objectives = Registry(
    "objective",
    {
        "ce": "tes.objectives.ce:CrossEntropy",
        "l2_sp": "tes.objectives.l2_sp:L2SP",
        "label_smoothing": "tes.objectives.label_smoothing:LabelSmoothing",
        "static_text": "tes.objectives.static_text:StaticText",
        "tes": "tes.objectives.tes:TextSupervised",
        "text_ce": "tes.objectives.text_ce:TextCrossEntropy",
    },
    "tes.objectives",
)
