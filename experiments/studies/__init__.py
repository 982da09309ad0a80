"""Studies: many runs, and what they show. One file a kind of study, one yaml each study in `conf/experiment`."""

from ..results import Sheet
from .base import Cell, Report, Study
from .causality import Causality
from .failures import Failures
from .frontier import Frontier
from .grid import Grid
from .paired import Paired
from .trigger import Trigger
from .tuning import Tuning

__all__ = [
    "Causality",
    "Cell",
    "Failures",
    "Frontier",
    "Grid",
    "Paired",
    "Report",
    "Sheet",
    "Study",
    "Trigger",
    "Tuning",
]
