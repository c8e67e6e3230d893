"""Text-supervised fine-tuning of pre-trained vision models (TeS, ICCV 2023).

    import tes
    run = tes.train(tes.load_config(flags={"data.source": "photos", "data.shots": 5}))
    print(run.metrics["test"]["vision"]["mean_per_class"])
    for row in tes.Classifier.from_run(run).predict(["photo.jpg"]):
        print(row.label, row.prob)

The names below are the public interface; each is imported on first use, so that `import tes` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Classifier": "tes.verbs.predict",
    "Config": "tes.config",
    "Objective": "tes.objectives.base",
    "Run": "tes.run",
    "TesError": "tes.errors",
    "average": "tes.verbs.average",
    "benchmark": "tes.verbs.benchmark",
    "available": "tes.catalogue",
    "calibrate": "tes.verbs.calibrate",
    "check": "tes.verbs.check",
    "compare": "tes.verbs.compare",
    "diagnose": "tes.verbs.diagnose",
    "evaluate": "tes.verbs.evaluate",
    "load_config": "tes.config",
    "register": "tes.catalogue",
    "report": "tes.verbs.report",
    "train": "tes.verbs.train",
    "verify": "tes.verbs.verify",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module `tes` has no attribute `{name}`")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
