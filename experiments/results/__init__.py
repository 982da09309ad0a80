"""The store of all runs, what runs are in words, and tables of their numbers; `python -m experiments.results` lists,
filters, compares and merges the runs.
"""

from .query import described, differing, flat, made, matching, same_task, settings
from .sheets import Estimate, Sheet, metric_rows
from .store import DEFAULT, PACKAGES, Results, Run, checked, code, digest, versions

__all__ = [
    "DEFAULT",
    "PACKAGES",
    "Estimate",
    "Results",
    "Run",
    "Sheet",
    "checked",
    "code",
    "described",
    "differing",
    "digest",
    "flat",
    "made",
    "matching",
    "metric_rows",
    "same_task",
    "settings",
    "versions",
]
