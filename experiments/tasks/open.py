"""Open questions, whose answers only a judge can rate: MMHal-Bench and MM-Vet. `python -m experiments.judge` is a
client for judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from ..inputs import reading
from .base import Item, Task

MMHAL = "https://huggingface.co/datasets/Shengcao1006/MMHal-Bench"
MMVET = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"


class Open(Task):
    """A base of tasks whose answers are exported and rated elsewhere; only their length is measured here."""

    metrics = {"words": "words per answer"}
    tested = ("words",)

    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        return np.array([[1, len(row["caption"].split())] for row in rows], float).reshape(-1, 2)

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"words": total[..., 1] / total[..., 0]}


@dataclass
class MMHal(Open):
    """MMHal-Bench (Sun et al. 2023, https://arxiv.org/abs/2309.14525): 96 questions of eight types on pictures of
    OpenImages.

    file: its response_template.json.
    images: the folder with the pictures, each under the last part of its `image_src`.
    start, count: the part of the questions.
    """

    file: str
    images: str
    start: int = 0
    count: int | None = None

    @property
    def title(self) -> str:
        return "MMHal-Bench"

    def _records(self) -> list[dict]:
        found = reading.load(self.file, "MMHal-Bench's response template", MMHAL, list)
        return [
            reading.fields(
                row,
                ("question_type", "image_src", "image_content", "question", "gt_answer"),
                f"record {n} of '{self.file}'",
            )
            for n, row in enumerate(found)
        ]

    def items(self) -> list[Item]:
        asked = reading.part(list(enumerate(self._records())), self.start, self.count, f"records in '{self.file}'")
        names = {n: Path(urlsplit(row["image_src"]).path).name for n, row in asked}
        files = reading.pictures(self.images, dict.fromkeys(names.values()), "MMHal-Bench's pictures", MMHAL)
        kept = ("question_type", "image_content", "gt_answer")
        return [
            Item(str(n), None, files[names[n]], row["question"], names[n], {key: row[key] for key in kept})
            for n, row in asked
        ]

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """`mmhal.json`: the template with every `model_answer` given here, for the official eval_gpt4.py, which wants
        all 96 records.
        """
        answers = {int(row["image"]): row["caption"] for row in rows}
        filled = [row | ({"model_answer": answers[n]} if n in answers else {}) for n, row in enumerate(self._records())]
        return [reading.write(folder / "mmhal.json", filled)]


@dataclass
class MMVet(Open):
    """MM-Vet (Yu et al. 2023, https://arxiv.org/abs/2308.02490): 218 questions that need several abilities at once.

    file: its mm-vet.json.
    images: the folder `images` beside it.
    start, count: the part of the questions.
    """

    file: str
    images: str
    start: int = 0
    count: int | None = None

    @property
    def title(self) -> str:
        return "MM-Vet"

    def items(self) -> list[Item]:
        found = reading.load(self.file, "MM-Vet's file of questions", MMVET, dict)
        asked = [
            (name, reading.fields(row, ("imagename", "question", "answer"), f"'{name}' of '{self.file}'"))
            for name, row in found.items()
        ]
        asked = reading.part(asked, self.start, self.count, f"questions in '{self.file}'")
        files = reading.pictures(
            self.images, dict.fromkeys(row["imagename"] for _, row in asked), "MM-Vet's pictures", MMVET
        )
        return [
            Item(
                name,
                None,
                files[row["imagename"]],
                row["question"],
                row["imagename"],
                {"gt_answer": row["answer"], "capability": row.get("capability", [])},
            )
            for name, row in asked
        ]

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """`mmvet.json`, answers by question, for the official evaluator."""
        return [reading.write(folder / "mmvet.json", {row["image"]: row["caption"] for row in rows})]
