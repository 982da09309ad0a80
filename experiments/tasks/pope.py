"""Questions that are answered with yes or no: the official POPE files, and what all such tasks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..inputs import reading
from ..inputs.errors import InputError
from ..metrics import pope
from ..scenes import world
from .base import Item, Task

PUBLISHED = (
    "https://github.com/AoiDragon/POPE (output/coco; the pictures are COCO's val2014,"
    " https://cocodataset.org/#download)"
)


class YesNo(Task):
    """A base of tasks whose items have a `label`, yes or no, in their truth."""

    metrics = {
        "accuracy": "accuracy %",
        "precision": "precision %",
        "recall": "recall %",
        "f1": "F1 %",
        "yes": "answered yes, %",
        "neither": "neither yes nor no, %",
    }
    tested = ("accuracy", "f1", "yes")

    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        """As `pope.counts`, and whether the answer says neither yes nor no: float [questions, 5]."""
        said = [row["caption"] for row in rows]
        table = pope.counts([row["label"] == "yes" for row in rows], [pope.yes(text) for text in said])
        return np.column_stack([table, np.array([pope.neither(text) for text in said], dtype=float)])

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            neither = total[..., 4] / total[..., :4].sum(-1)
        return pope.rates(total[..., :4]) | {"neither": 100 * neither}


def probe_item(probe: pope.Probe, objects: list[str], source: world.Scene | Path, question: str) -> Item:
    """The item of a generated probe."""
    return Item(
        f"{probe.image} {probe.name}", objects, source, question, probe.image, {"label": "yes" if probe.there else "no"}
    )


@dataclass
class PopeFile(YesNo):
    """An official file of POPE's questions, a JSON object a line: `question_id`, `image`, `text`, `label`.

    file: coco_pope_random.json, say, or one of another data set in the same format.
    images: the folder that its pictures lie in.
    start, count: the part of the questions.
    """

    file: str
    images: str
    start: int = 0
    count: int | None = None

    @property
    def title(self) -> str:
        return f"POPE, {Path(self.file).stem}"

    def items(self) -> list[Item]:
        asked = reading.part(self._questions(), self.start, self.count, f"questions in '{self.file}'")
        files = reading.pictures(
            self.images, dict.fromkeys(row["image"] for row in asked), "POPE's pictures", PUBLISHED
        )
        return [
            Item(
                str(row["question_id"]),
                None,
                files[row["image"]],
                row["text"],
                row["image"],
                {"label": row["label"], "question_id": row["question_id"]},
            )
            for row in asked
        ]

    def _questions(self) -> list[dict]:
        """The rows of the file. Raises InputError with the number of a line that is broken."""
        place = reading.find(self.file, "POPE's file of questions", PUBLISHED)
        rows, seen = [], {}
        for number, where, value in reading.lines(place, "POPE's file of questions"):
            row = reading.fields(value, ("question_id", "image", "text", "label"), where)
            if row["label"] not in ("yes", "no"):
                raise InputError(f"{where} has the label {json.dumps(row['label'])}; a label is yes or no")
            first = seen.setdefault(row["question_id"], number)
            if first != number:
                raise InputError(
                    f"{where} has the question_id {row['question_id']} of line {first}; each question needs its own"
                )
            rows.append(row)
        return rows

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """`answers.json` and `labels.json`, lines in the order of the questions: `ans_file` and `label_file` of POPE's
        evaluate.py.

        The labels are those of the questions answered, as that script holds the two files against each other line by
        line.
        """
        return [
            reading.write_lines(
                folder / "answers.json",
                (
                    {"question_id": row["question_id"], "question": row["question"], "answer": row["caption"]}
                    for row in rows
                ),
            ),
            reading.write_lines(
                folder / "labels.json",
                ({"question_id": row["question_id"], "text": row["question"], "label": row["label"]} for row in rows),
            ),
        ]
