"""AMBER: descriptions of 1,004 pictures, and 14,216 questions about them that are answered with yes or no.

An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation (Wang et al. 2023,
https://arxiv.org/abs/2311.07397). Its `data` folder is published at https://github.com/junyangwang0410/AMBER; the link
to the pictures is in its README.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decoders.errors import choices

from ..inputs import reading
from ..inputs.errors import InputError
from ..metrics import pope
from ..metrics.words import singulars
from .base import Item, Task
from .pope import YesNo

PUBLISHED = "https://github.com/junyangwang0410/AMBER"
# words of AMBER's vocabulary that captions use mostly as verbs or adjectives: as nouns they stand behind an article or
# a number
_RARELY_NOUNS = {"can", "drink", "file", "leave", "note", "support", "switch", "watch"}
_BEFORE_NOUNS = {
    "a",
    "an",
    "the",
    "his",
    "her",
    "its",
    "their",
    "this",
    "that",
    "these",
    "those",
    "some",
    "several",
    "many",
    "no",
    "of",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
}
_NEVER_NOUNS = {"hot"}  # a dish in the annotations, "hot dog"; alone it is an adjective


def nouns(text: str, vocabulary: set[str]) -> list[str]:
    """The words of the vocabulary that a text uses as nouns, singular, in order, as often as they come."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())
    found = []
    for before, word in zip(["", *words], words, strict=False):
        name = next((n for n in (word, *singulars(word)) if n in vocabulary), None)
        if name is not None and name not in _NEVER_NOUNS and (name not in _RARELY_NOUNS or before in _BEFORE_NOUNS):
            found.append(name)
    return found


def _place(word: str, names: list[str], relation: dict[str, list[str]]) -> int | None:
    """Which of the annotated names a word stands for; as in the official script, words related to a name come before
    the names themselves.
    """
    for number, name in enumerate(names):
        if word in relation.get(name, ()):
            return number
    return names.index(word) if word in names else None


def score(text: str, truth: list[str], hallu: list[str], relation: dict[str, list[str]], safe: set[str]) -> list[float]:
    """Numbers of one description: 1, whether anything is false, nouns, false nouns, annotated objects, those named,
    likely errors, those named, words.

    Args:
        text: the description.
        truth: the objects in the picture.
        hallu: objects not in it that a model may well see.
        relation: a name -> the words that may stand for it.
        safe: words that are never false.
    """
    false, covered, guessed = 0, set(), set()
    mentioned = nouns(text, {*relation, *(word for words in relation.values() for word in words)})
    for word in mentioned:
        if word in safe:
            continue
        here = _place(word, truth, relation)
        if here is not None:
            covered.add(here)
            continue
        false += 1
        there = _place(word, hallu, relation)
        if there is not None:
            guessed.add(there)
    return [
        1,
        bool(false),
        len(mentioned),
        false,
        len(truth),
        len(covered),
        len(hallu),
        len(guessed),
        len(text.split()),
    ]


class _Amber:
    """What both parts read: a query file and the annotations."""

    data: str
    images: str
    start: int
    count: int | None

    def _asked(self, file: str, needs: tuple[str, ...]) -> list[tuple[dict, dict, Path]]:
        """The queries asked for, each with its annotation and its picture. Raises InputError."""
        path, notes = f"{self.data}/query/{file}", f"{self.data}/annotations.json"
        queries = [
            reading.fields(row, ("id", "image", "query"), f"query {n} of '{path}'")
            for n, row in enumerate(reading.load(path, "AMBER's file of queries", PUBLISHED, list))
        ]
        known = {
            reading.fields(row, ("id",), f"entry {n} of '{notes}'")["id"]: row
            for n, row in enumerate(reading.load(notes, "AMBER's file of annotations", PUBLISHED, list))
        }
        queries = reading.part(queries, self.start, self.count, f"queries in '{path}'")
        for row in queries:
            if row["id"] not in known:
                raise InputError(
                    f"query {row['id']} of '{path}' has no annotation in '{notes}'; both are published at {PUBLISHED}"
                )
            reading.fields(known[row["id"]], needs, f"annotation {row['id']} of '{notes}'")
        files = reading.pictures(
            self.images, dict.fromkeys(row["image"] for row in queries), "AMBER's pictures", PUBLISHED
        )
        return [(row, known[row["id"]], files[row["image"]]) for row in queries]


@dataclass
class AmberGenerative(_Amber, Task):
    """AMBER's descriptions: CHAIR (false nouns among all nouns), Cover (annotated objects that are named), Hal
    (descriptions with a false noun) and Cog
    (likely errors that are made), each over all descriptions together, as in the official inference.py. **Not the
    official numbers**: that script takes the nouns that NLTK tags, and takes a noun for an annotated word also where
    spaCy's large vectors find them similar (above 0.8). Here, where neither model can be bundled, nouns are the words
    of AMBER's vocabulary (relation.json), plurals undone by their endings; of words such as "can" or "watch" only those
    behind an article or number; and a noun stands for an object if it is its name or one of its words in relation.json.
    What only the similarity would have accepted counts as false: CHAIR and Hal come out higher, and Cover and Cog
    lower. Run the official script on what `export` writes for numbers to compare with published ones; stacks can be
    compared with each other by these.

    data: AMBER's folder `data`, with query/query_generative.json, annotations.json, relation.json and safe_words.txt.
    images: the folder with AMBER_1.jpg to AMBER_1004.jpg.
    start, count: the part of the pictures.
    """

    data: str
    images: str
    start: int = 0
    count: int | None = None

    metrics = {
        "chair": "CHAIR %",
        "cover": "Cover %",
        "hal": "Hal %",
        "cog": "Cog %",
        "words": "words per caption",
    }
    tested = ("chair", "cover", "hal", "cog")

    @property
    def title(self) -> str:
        return "AMBER, descriptions (nouns matched without spaCy)"

    def items(self) -> list[Item]:
        found = []
        for query, note, file in self._asked("query_generative.json", ("truth", "hallu")):
            found.append(
                Item(
                    str(query["id"]),
                    None,
                    file,
                    query["query"],
                    query["image"],
                    {kind: [word.lower() for word in note[kind]] for kind in ("truth", "hallu")},
                )
            )
        relation = self._relation()
        self._safe()
        for item in found:
            strange = [word for word in item.truth["truth"] + item.truth["hallu"] if word not in relation]
            if strange:
                raise InputError(
                    f"annotation {item.id} names '{strange[0]}', which '{self.data}/relation.json' does not; both files"
                    f" must come from one copy of {PUBLISHED}"
                )
        return found

    def _relation(self) -> dict[str, list[str]]:
        found = reading.load(f"{self.data}/relation.json", "AMBER's table of related words", PUBLISHED, dict)
        return {name.lower(): [word.lower() for word in words] for name, words in found.items()}  # it has a TV

    def _safe(self) -> set[str]:
        return set(
            reading.find(f"{self.data}/safe_words.txt", "AMBER's list of safe words", PUBLISHED)
            .read_text(encoding="utf-8")
            .split()
        )

    def counts(self, rows: Sequence[dict]) -> np.ndarray:
        relation = self._relation()
        safe = self._safe()
        return np.array(
            [score(row["caption"], row["truth"], row["hallu"], relation, safe) for row in rows], float
        ).reshape(-1, 9)

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        n, bad, named, false, truth, covered, hallu, guessed, words = np.moveaxis(total, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "chair": 100 * false / named,
                "cover": 100 * covered / truth,
                "hal": 100 * bad / n,
                "cog": 100 * guessed / hallu,
                "words": words / n,
            }

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """`amber_generative.json` for the official inference.py (--evaluation_type g)."""
        return [
            reading.write(
                folder / "amber_generative.json",
                [{"id": int(row["image"]), "response": row["caption"]} for row in rows],
            )
        ]


PARTS = {"all": "query_discriminative.json"} | {
    name: f"query_discriminative-{name}.json" for name in ("existence", "attribute", "relation")
}


@dataclass
class AmberQuestions(_Amber, YesNo):
    """AMBER's questions. As in the official script, what is to be found is a hallucination: precision is the share of
    noes that are right, and recall
    the share of questions with the right answer no that are answered so. F1 is made from them unrounded (officially
    from percentages rounded to one place).

    The official script knows the answers `Yes` and `No` and nothing else; here answers are read by POPE's rule
    (`metrics.pope.yes`), and exported as these two words.

    data, images: as in `AmberGenerative`.
    part: `all`, `existence`, `attribute` or `relation`.
    start, count: the part of the questions.
    """

    data: str
    images: str
    part: str = "all"
    start: int = 0
    count: int | None = None

    @property
    def title(self) -> str:
        return "AMBER, questions" + ("" if self.part == "all" else f" on {self.part}")

    def items(self) -> list[Item]:
        if self.part not in PARTS:
            raise InputError(choices(self.part, PARTS, "part of AMBER's questions"))
        asked = self._asked(PARTS[self.part], ("type", "truth"))
        for query, note, _ in asked:
            if note["truth"] not in ("yes", "no"):
                raise InputError(
                    f"annotation {query['id']} of '{self.data}/annotations.json' should say yes or no, it says"
                    f" {note['truth']!r}"
                )
        return [
            Item(
                str(query["id"]),
                None,
                file,
                query["query"],
                query["image"],
                {"label": note["truth"], "type": note["type"]},
            )
            for query, note, file in asked
        ]

    def rates(self, total: np.ndarray) -> dict[str, np.ndarray]:
        _, false_yes, true_no, false_no, _ = np.moveaxis(total, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = true_no / (true_no + false_no), true_no / (true_no + false_yes)
            f1 = 2 * precision * recall / (precision + recall)
        return super().rates(total) | {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1}

    def export(self, rows: Sequence[dict], folder: Path) -> list[Path]:
        """`amber_discriminative.json` for the official inference.py (--evaluation_type d, or de, da, dr for a part)."""
        answers = [{"id": int(row["image"]), "response": "Yes" if pope.yes(row["caption"]) else "No"} for row in rows]
        return [reading.write(folder / "amber_discriminative.json", answers)]
