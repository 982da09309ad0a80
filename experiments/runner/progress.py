"""The bar that shows how far a run is."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress(console: Console, *more: ProgressColumn) -> Progress:
    """A bar of what is done of how much, and the time that is left; `more` columns stand behind it."""
    text = TextColumn("{task.description:>24}", markup=False)
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *more, console=console)
