"""The page of a run, a comparison or a benchmark: one HTML file that needs nothing else.

Reads run folders only; no torch here.
"""

from tes.page.benchmark_page import benchmark_page
from tes.page.comparison_page import comparison_page
from tes.page.run_page import run_page

__all__ = ["benchmark_page", "comparison_page", "run_page"]
