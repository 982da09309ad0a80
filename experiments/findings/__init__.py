"""What the studies show: csv files and plots of a store's answers, and the page `docs/results.md` of these files."""

from ..models import ROOT

DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
