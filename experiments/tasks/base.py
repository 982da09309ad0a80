"""What a task is: pictures, what is asked of each, and how the answers are scored."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from ..metrics import chair, chair_context
from ..scenes import world


@dataclass
class Item:
    """One answer to be given.

    id: its name, unique in the task.
    objects: the COCO categories in the picture, or None where nobody knows.
    source: where the picture comes from: a scene, a file, or what a file holds.
    question: what is asked; None: the model's prompt.
    picture: the name of the picture, where several questions are asked of one; what is said of one picture is drawn
    together in the bootstrap.
    truth: what the row keeps for scoring, a question's right answer, say.
    """

    id: str
    objects: list[str] | None
    source: world.Scene | Path | bytes
    question: str | None = None
    picture: str | None = None
    truth: dict = field(default_factory=dict)

    @property
    def names(self) -> bool:
        """Whether what an answer names is what it claims to see: not so where it says yes or no."""
        return self.objects is not None and "label" not in self.truth

    def open(self) -> Image.Image:
        """The picture in RGB. Raises OSError for a file that cannot be read."""
        if isinstance(self.source, world.Scene):
            return world.render(self.source)
        try:
            with Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as file:
                return flat(ImageOps.exif_transpose(file))
        except Exception as error:  # Pillow's readers raise many kinds for broken files
            raise OSError(f"no readable image: {error}") from error


def flat(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip to white
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Task(ABC):
    """A benchmark. Subclasses are dataclasses, one yaml each in `conf/task`.

    Scores are ratios of sums, so that one bootstrap serves all: `counts` gives a row of numbers for each answer,
    `rates` makes metrics from sums of them.
    """

    metrics: ClassVar[dict[str, str]]  # each metric's name, and its title in tables
    tested: ClassVar[tuple[str, ...]]  # those that studies test
    beside: ClassVar[tuple[str, ...]] = ()  # those by another rule than the published; studies have them apart

    @property
    @abstractmethod
    def title(self) -> str:
        """What tables are headed with."""

    @abstractmethod
    def items(self) -> list[Item]:
        """What is asked, in an order that never changes. Raises InputError where data are missing, with the place where
        they are published.
        """

    @abstractmethod
    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        """Numbers of each answer, float [rows, columns]. A row is what `describe` keeps: `caption`, `objects`,
        `question` and the item's `truth`.
        """

    @abstractmethod
    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        """Every one of `metrics` from sums of `counts`, [..., columns]; shares in per cent, NaN where there is nothing
        to divide by.
        """

    def scored(self, rows: Sequence[dict]) -> list[dict]:
        """The rows that can be scored."""
        return list(rows)

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """Write the answers of one stack into `folder` in the benchmark's own format, for its own scripts; returns the
        files.
        """
        return []


class Captions(Task):
    """Descriptions, scored by CHAIR; a base of tasks whose items know the categories in the picture.

    All metrics are by the published rule but the last two, which are of the mentions that `chair_context` finds,
    against the same objects.
    """

    metrics = {
        "chair_s": "CHAIR_S %",
        "chair_i": "CHAIR_I %, per mention",
        "chair_i_unique": "CHAIR_I %, per unique object",
        "recall": "recall %",
        "precision": "precision %",
        "f1": "F1 %",
        "words": "words per caption",
        "mentions": "mentions per caption",
        "chair_s_context": "CHAIR_S %, in context",
        "chair_i_context": "CHAIR_I %, in context",
    }
    tested = ("chair_s", "chair_i", "chair_i_unique", "recall", "f1")
    beside = ("chair_s_context", "chair_i_context")

    def scored(self, rows: Sequence[dict]) -> list[dict]:
        return [row for row in rows if row["objects"] is not None]

    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        return np.hstack(
            [
                chair.counts([rule.score(row["caption"], row["objects"]) for row in rows])
                for rule in (chair, chair_context)
            ]
        )

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        published, context = (chair.rates(half) for half in np.split(total, 2, axis=-1))
        return published | {f"{name}_context": context[name] for name in ("chair_s", "chair_i")}
