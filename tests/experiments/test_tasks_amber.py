"""AMBER: nouns, the four numbers of descriptions by hand, questions whose positive answer is no, and what the official script takes."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.errors import InputError
from experiments.tasks import AmberGenerative, AmberQuestions
from experiments.tasks.amber import nouns

RELATION = {
    "sky": [],
    "grass": ["ground"],
    "person": ["people", "man", "woman"],
    "ground": ["floor"],
    "dog": [],
    "tree": ["forest", "leave"],
    "cloud": [],
    "bin": ["can"],
    "television": ["TV"],
    "light": [],
}
NOTES = [
    {"id": 1, "type": "generative", "truth": ["sky", "grass", "person", "ground"], "hallu": ["cloud", "dog"]},
    {"id": 2, "type": "generative", "truth": ["television"], "hallu": ["person"]},
    {"id": 3, "type": "generative", "truth": ["sky"], "hallu": []},
    {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-number", "truth": "yes"},
    {"id": 7, "type": "relation", "truth": "no"},
    {"id": 8, "type": "discriminative-relation", "truth": "yes"},
]
ANSWERS = ["A man and two women stand on the ground under a light. A dog can be seen; the trees are green.", "A TV on the floor.", "The sky."]


def _amber(folder, notes=NOTES) -> dict:
    query = folder / "data" / "query"
    query.mkdir(parents=True)
    asked = [{"id": n["id"], "image": f"AMBER_{1 + n['id'] % 3}.jpg", "query": "Describe this image." if n["type"] == "generative" else f"Question {n['id']}?"} for n in notes]
    for name, ids in {"generative": (1, 2, 3), "discriminative": (4, 5, 6, 7, 8), "discriminative-existence": (4,), "discriminative-attribute": (5, 6), "discriminative-relation": (7, 8)}.items():
        (query / f"query_{name}.json").write_text(json.dumps([row for row in asked if row["id"] in ids]))
    (folder / "data" / "annotations.json").write_text(json.dumps(notes))
    (folder / "data" / "relation.json").write_text(json.dumps(RELATION))
    (folder / "data" / "safe_words.txt").write_text("light\nsign")
    for n in (1, 2, 3):
        Image.new("RGB", (2, 2)).save(folder / f"AMBER_{n}.jpg")
    return {"data": str(folder / "data"), "images": str(folder)}


def _rows(items, answers):
    return [{"image": i.id, "question": i.question, "caption": text} | i.truth for i, text in zip(items, answers, strict=True)]


def test_nouns():
    vocabulary = {"man", "child", "can", "dog", "people", "watch", "tv", "hot", "glass", "leave"}
    assert nouns("Men watch the children; a watch can be seen beside the cans, a hot dog, people, glasses and a TV. Leaves.", vocabulary) == [
        "man",
        "child",
        "watch",
        "can",
        "dog",
        "people",
        "glass",
        "tv",
    ]
    assert nouns("Cannot, can!", vocabulary) == []


def test_descriptions_by_hand(tmp_path):
    task = AmberGenerative(**_amber(tmp_path))
    items = task.items()
    assert [(i.id, i.question, i.picture) for i in items] == [("1", "Describe this image.", "AMBER_2.jpg"), ("2", "Describe this image.", "AMBER_3.jpg"), ("3", "Describe this image.", "AMBER_1.jpg")]
    rows = _rows(items, ANSWERS)
    assert task.counts(rows).tolist() == [
        [1, 1, 6, 2, 4, 2, 2, 1, 21],  # man, woman, ground, light, dog, tree; dog and tree are false; person, and grass by its related word ground; the dog was to be expected
        [1, 1, 2, 1, 1, 1, 1, 0, 5],  # tv, floor
        [1, 0, 1, 0, 1, 1, 0, 0, 2],
    ]
    assert task.rates(task.counts(rows).sum(0)) == pytest.approx({"chair": 100 * 3 / 9, "cover": 100 * 4 / 6, "hal": 100 * 2 / 3, "cog": 100 * 1 / 3, "words": 28 / 3})
    (file,) = task.export(rows, tmp_path / "out")
    assert json.loads(file.read_text()) == [{"id": n, "response": text} for n, text in enumerate(ANSWERS, 1)]
    assert task.counts([]).shape == (0, 9)


def test_no_is_the_positive_answer(tmp_path):
    fields = _amber(tmp_path)
    task = AmberQuestions(**fields)
    rows = _rows(task.items(), ["No", "Yes, it is.", "no", "No, it is not.", "Yes"])
    # of three noes two are right, of three questions with the answer no two were found
    assert task.rates(task.counts(rows).sum(0)) == pytest.approx({"accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes": 40})
    (file,) = task.export(rows, tmp_path / "out")
    assert json.loads(file.read_text()) == [{"id": 4 + n, "response": text} for n, text in enumerate(["No", "Yes", "No", "No", "Yes"])]
    assert [[i.id for i in AmberQuestions(**fields, part=part).items()] for part in ("existence", "attribute", "relation")] == [["4"], ["5", "6"], ["7", "8"]]
    assert [i.id for i in AmberQuestions(**fields, start=1, count=2).items()] == ["5", "6"]
    only = task.rates(task.counts(rows[:1]).sum(0))
    assert only["recall"] == only["precision"] == 100 and np.isfinite(only["f1"])


def test_what_is_wrong_is_said(tmp_path):
    fields = _amber(tmp_path)
    with pytest.raises(InputError, match="part of AMBER's questions 'existense'. Did you mean 'existence'"):
        AmberQuestions(**fields, part="existense").items()
    with pytest.raises(InputError, match=r"AMBER's file of queries is missing: no 'nowhere/query/query_generative.json'. It is published at https://github.com/junyangwang0410/AMBER"):
        AmberGenerative(**fields | {"data": "nowhere"}).items()
    (tmp_path / "AMBER_2.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 3 pictures are missing in .*: AMBER_2.jpg; AMBER's pictures"):
        AmberGenerative(**fields).items()
    notes = tmp_path / "data" / "annotations.json"
    for changed, words in (
        (NOTES[1:], "query 1 of .* has no annotation"),
        ([{"id": 1, "type": "generative"}, *NOTES[1:]], "annotation 1 of .* lacks truth, hallu"),
        ({}, "should hold a JSON list, it holds a dict"),
    ):
        notes.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            AmberGenerative(**fields).items()
    Image.new("RGB", (2, 2)).save(tmp_path / "AMBER_2.jpg")
    notes.write_text(json.dumps([NOTES[0] | {"truth": ["unicorn"]}, *NOTES[1:]]))
    with pytest.raises(InputError, match="annotation 1 names 'unicorn', which .*relation.json' does not"):
        AmberGenerative(**fields).items()
