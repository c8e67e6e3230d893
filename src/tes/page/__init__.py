"""The page of a run or a comparison: one HTML file that needs nothing else. Reads run folders only; no torch here."""

from tes.page.comparison_page import comparison_page
from tes.page.run_page import run_page

__all__ = ["comparison_page", "run_page"]
