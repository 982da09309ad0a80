"""AMBER: nouns, the four numbers of descriptions by hand, questions whose positive answer is no, and what the official
script takes.
"""

import importlib.util
import json
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.inputs.errors import InputError
from experiments.tasks import AmberGenerative, AmberQuestions
from experiments.tasks.amber import nouns, score

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
ANSWERS = [
    "A man and two women stand on the ground under a light. A dog can be seen; the trees are green.",
    "A TV on the floor.",
    "The sky.",
]


def _amber(folder, notes=NOTES) -> dict:
    query = folder / "data" / "query"
    query.mkdir(parents=True)
    asked = [
        {
            "id": n["id"],
            "image": f"AMBER_{1 + n['id'] % 3}.jpg",
            "query": "Describe this image." if n["type"] == "generative" else f"Question {n['id']}?",
        }
        for n in notes
    ]
    for name, ids in {
        "generative": (1, 2, 3),
        "discriminative": (4, 5, 6, 7, 8),
        "discriminative-existence": (4,),
        "discriminative-attribute": (5, 6),
        "discriminative-relation": (7, 8),
    }.items():
        (query / f"query_{name}.json").write_text(json.dumps([row for row in asked if row["id"] in ids]))
    (folder / "data" / "annotations.json").write_text(json.dumps(notes))
    (folder / "data" / "relation.json").write_text(json.dumps(RELATION))
    (folder / "data" / "safe_words.txt").write_text("light\nsign")
    for n in (1, 2, 3):
        Image.new("RGB", (2, 2)).save(folder / f"AMBER_{n}.jpg")
    return {"data": str(folder / "data"), "images": str(folder)}


def _rows(items, answers):
    return [
        {"image": i.id, "question": i.question, "caption": text} | i.truth
        for i, text in zip(items, answers, strict=True)
    ]


def test_nouns():
    vocabulary = {"man", "child", "can", "dog", "people", "watch", "tv", "hot", "glass", "leave"}
    assert nouns(
        "Men watch the children; a watch can be seen beside the cans, a hot dog, people, glasses and a TV. Leaves.",
        vocabulary,
    ) == [
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
    assert [(i.id, i.question, i.picture) for i in items] == [
        ("1", "Describe this image.", "AMBER_2.jpg"),
        ("2", "Describe this image.", "AMBER_3.jpg"),
        ("3", "Describe this image.", "AMBER_1.jpg"),
    ]
    rows = _rows(items, ANSWERS)
    assert task.counts(rows).tolist() == [
        [
            1,
            1,
            6,
            2,
            4,
            2,
            2,
            1,
            21,
            # man, woman, ground, light, dog, tree; dog and tree are false; person, and grass by its related word
            # ground; the dog was to be expected
        ],
        [1, 1, 2, 1, 1, 1, 1, 0, 5],  # tv, floor
        [1, 0, 1, 0, 1, 1, 0, 0, 2],
    ]
    assert task.rates(task.counts(rows).sum(0)) == pytest.approx(
        {"chair": 100 * 3 / 9, "cover": 100 * 4 / 6, "hal": 100 * 2 / 3, "cog": 100 * 1 / 3, "words": 28 / 3}
    )
    (file,) = task.export(rows, tmp_path / "out")
    assert json.loads(file.read_text()) == [{"id": n, "response": text} for n, text in enumerate(ANSWERS, 1)]
    assert task.counts([]).shape == (0, 9)


def test_no_is_the_positive_answer(tmp_path):
    fields = _amber(tmp_path)
    task = AmberQuestions(**fields)
    rows = _rows(task.items(), ["No", "Yes, it is.", "no", "No, it is not.", "Yes"])
    # of three noes two are right, of three questions with the answer no two were found
    assert task.rates(task.counts(rows).sum(0)) == pytest.approx(
        {"accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3, "yes": 40, "neither": 0}
    )
    (file,) = task.export(rows, tmp_path / "out")
    assert json.loads(file.read_text()) == [
        {"id": 4 + n, "response": text} for n, text in enumerate(["No", "Yes", "No", "No", "Yes"])
    ]
    assert [
        [i.id for i in AmberQuestions(**fields, part=part).items()] for part in ("existence", "attribute", "relation")
    ] == [["4"], ["5", "6"], ["7", "8"]]
    assert [i.id for i in AmberQuestions(**fields, start=1, count=2).items()] == ["5", "6"]
    only = task.rates(task.counts(rows[:1]).sum(0))
    assert only["recall"] == only["precision"] == 100 and np.isfinite(only["f1"])


def test_what_is_wrong_is_said(tmp_path):
    fields = _amber(tmp_path)
    with pytest.raises(InputError, match="part of AMBER's questions 'existense'. Did you mean 'existence'"):
        AmberQuestions(**fields, part="existense").items()
    with pytest.raises(
        InputError,
        match=(
            r"AMBER's file of queries is missing: no 'nowhere/query/query_generative.json'. It is published at"
            r" https://github.com/junyangwang0410/AMBER"
        ),
    ):
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


def _lmms(monkeypatch):
    """lmms-eval's AMBER, which follows the official script; NLTK's nouns and spaCy's similarity, which need models, are
    stood in for by ours and by equality.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    stem = types.ModuleType("nltk.stem")
    stem.WordNetLemmatizer = None
    for name, module in (("nltk", types.ModuleType("nltk")), ("nltk.stem", stem), ("spacy", types.ModuleType("spacy"))):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(
        "lmms_amber", Path(spec.submodule_search_locations[0]) / "tasks/amber_g/utils.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.check_synonyms_word = lambda one, two, threshold: one == two
    return module


def test_agreement_with_lmms_eval(monkeypatch):
    lmms, rng = _lmms(monkeypatch), np.random.default_rng(0)
    names = [name for name in RELATION if name != "television"]
    relation = {name: RELATION[name] for name in names}
    words = sorted({*names, *(w for related in relation.values() for w in related)} - {"can", "leave"})
    for _ in range(200):
        picked = rng.choice(names, 8).tolist()
        truth, hallu = picked[: rng.integers(1, 5)], picked[5 : 5 + rng.integers(1, 4)]
        text = " and a ".join(rng.choice(words, rng.integers(1, 9)).tolist())
        theirs = defaultdict(int)
        lmms.extract_nouns = lambda t: nouns(t, set(words))
        lmms.process_generative_task(
            {"question_id": 1, "text": text},
            {"truth": truth, "hallu": hallu},
            relation,
            set(words),
            ["light"],
            0.8,
            theirs,
        )
        kinds = (
            "chair_num",
            "chair_score",
            "safe_cover_num",
            "safe_cover_score",
            "hallu_cover_num",
            "hallu_cover_score",
        )
        ours = score(text, truth, hallu, relation, {"light"})
        assert ours[2:8] == [theirs[kind] for kind in kinds] and ours[1] == 1 - theirs["non_hallu_score"], (
            text,
            truth,
            hallu,
        )


def test_agreement_of_questions_with_lmms_eval(tmp_path, monkeypatch):
    lmms, task, rng, theirs = _lmms(monkeypatch), AmberQuestions("", ""), np.random.default_rng(1), defaultdict(int)
    rows = [{"label": ("no", "yes")[rng.integers(2)], "caption": ("No", "Yes")[rng.integers(2)]} for _ in range(50)]
    for row in rows:
        lmms.process_discriminative_task(
            {"question_id": 1, "text": row["caption"]}, {"type": "relation", "truth": row["label"]}, theirs
        )
    got = task.rates(task.counts(rows).sum(0))
    assert got["accuracy"] == pytest.approx(100 * theirs["qa_correct_score"] / theirs["qa_correct_num"])
    assert got["precision"] == pytest.approx(100 * theirs["qa_ans_no_score"] / theirs["qa_ans_no_num"])
    assert got["recall"] == pytest.approx(100 * theirs["qa_no_score"] / theirs["qa_no_num"])
