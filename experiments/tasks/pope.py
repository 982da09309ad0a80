"""Questions that are answered with yes or no: the official POPE files, and what all such tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..metrics import pope
from ..scenes import world
from .base import Item, Task


class YesNo(Task):
    """A base of tasks whose items have a `label`, yes or no, in their truth."""

    metrics = {"accuracy": "accuracy %", "precision": "precision %", "recall": "recall %", "f1": "F1 %", "yes": "answered yes, %"}

    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        return pope.counts([row["label"] == "yes" for row in rows], [pope.yes(row["caption"]) for row in rows])

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        return pope.rates(total)


def probe_item(probe: pope.Probe, objects: list[str], source: world.Scene | Path, question: str) -> Item:
    """The item of a generated probe."""
    return Item(f"{probe.image} {probe.name}", objects, source, question, probe.image, {"label": "yes" if probe.there else "no"})
