"""The page of a benchmark."""

from __future__ import annotations

from typing import Any

from tes import benchmark_folder as room
from tes.benchmark_folder import Benchmark
from tes.page.parts import Table, environment, render, section


def benchmark_page(made: Benchmark) -> str:
    """Return the page of a benchmark as HTML, whether it is finished or not."""
    found = room.rows(made)
    gaps = room.missing(made)
    labels = room.headings(found)
    words = frozenset(range(labels.index("arm") + 1))
    done = sum(one.state == "done" for one in made.combinations)

    def figures() -> dict[str, Any]:
        return {"table": Table("Figures, %", labels, room.cells(found), words), "legend": room.legend(found)[:1]}

    def details() -> dict[str, Any]:
        table = Table("Each figure, %", room.DETAILS, room.details(found), frozenset(range(5)), sortable=True)
        return {"table": table}

    axes = [list(dict.fromkeys(values)) for values in zip(*(one.key for one in made.combinations))]
    return render(
        "benchmark.html",
        {
            "title": f"{len(axes[0])} tasks · {', '.join(made.arms)}",
            "kind": "Benchmark",
            "facts": [
                ("tasks", ", ".join(axes[0])),
                ("backbones", ", ".join(axes[1])),
                ("text", ", ".join(axes[2])),
                ("comparisons", f"{done} of {len(made.combinations)} done"),
            ],
            "sentences": [room.caption(found)],
            "tiles": [],
            "sections": [
                section("figures", "The table", figures),
                section(
                    "missing", "What is missing", lambda: {"lines": gaps} if gaps else "Nothing: all has been run."
                ),
                section("details", "Each figure", details),
                section("reproduce", "How to reproduce this", lambda: environment(made.path)),
            ],
        },
    )
