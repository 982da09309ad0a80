"""POPE's official files: reading, what is wrong with them, metrics by hand, and what its own script takes; agreement
with lmms-eval.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.inputs.errors import InputError
from experiments.metrics import pope
from experiments.tasks import PopeFile

ROWS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a car in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there an oven in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a tie in the image?", "label": "no"},
    {"question_id": 5, "image": "b.jpg", "text": "Is there a cat in the image?", "label": "no"},
]


def _task(folder, rows=ROWS, **more):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (2, 2)).save(folder / name)
    (folder / "coco_pope_random.json").write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return PopeFile(str(folder / "coco_pope_random.json"), str(folder), **more)


def _rows(items, answers):
    return [
        {"image": i.id, "question": i.question, "caption": text} | i.truth
        for i, text in zip(items, answers, strict=True)
    ]


def test_metrics_by_hand(tmp_path):
    task = _task(tmp_path)
    items = task.items()
    assert [(i.id, i.picture, i.question) for i in items] == [
        (str(row["question_id"]), row["image"], row["text"]) for row in ROWS
    ]
    rows = _rows(items, ["Yes, there is a dog.", "yes", "There is not.", "No, it is a scarf.", "No"])
    # a true yes, a false yes, a false no, two true noes
    assert task.rates(task.counts(rows).sum(0)) == pytest.approx(
        {"accuracy": 60, "precision": 50, "recall": 50, "f1": 50, "yes": 40, "neither": 0}
    )


def test_answers_that_say_neither_yes_nor_no_have_a_share_of_their_own(tmp_path):
    task = _task(tmp_path)
    said = ["Yes, a dog.", "A dog is there.", "", "I am unsure. No idea.", "There's not."]
    got = task.rates(task.counts(_rows(task.items(), said)).sum(0))
    assert got["neither"] == 60 and got["yes"] == 80  # read as a yes, as in POPE's own script
    assert "neither" in task.metrics and np.isnan(task.rates(np.zeros(5))["neither"])


def test_export_is_what_the_official_script_takes(tmp_path):
    task = _task(tmp_path, start=1, count=2)
    rows = _rows(task.items(), ["yes", "no\nmore"])
    answers, labels = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in task.export(rows, tmp_path / "out")
    )
    assert answers == [
        {"question_id": 2, "question": ROWS[1]["text"], "answer": "yes"},
        {"question_id": 3, "question": ROWS[2]["text"], "answer": "no\nmore"},
    ]
    assert [row["label"] for row in labels] == ["no", "yes"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 3, is no JSON"),
        ("[1]", "line 3, should be a JSON object, it is a list"),
        (json.dumps({"question_id": 9, "image": "a.jpg"}), "line 3, lacks text, label; it has question_id, image"),
        (json.dumps(ROWS[2] | {"label": "Yes"}), 'line 3, has the label "Yes"; a label is yes or no'),
        (json.dumps(ROWS[2] | {"question_id": 2}), "line 3, has the question_id 2 of line 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    with pytest.raises(InputError, match=words):
        _task(tmp_path, [*ROWS[:2], line, *ROWS[3:]]).items()


def test_missing(tmp_path):
    with pytest.raises(
        InputError,
        match=r"file of questions is missing: no 'nowhere'. It is published at https://github.com/AoiDragon/POPE",
    ):
        PopeFile("nowhere", str(tmp_path)).items()
    task = _task(tmp_path)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 pictures are missing in .*: b.jpg; POPE's pictures"):
        task.items()
    assert [i.id for i in _task(tmp_path, count=2).items()] == ["1", "2"]
    with pytest.raises(InputError, match="there are 5 questions"):
        _task(tmp_path, start=4, count=2).items()


def test_agreement_with_lmms_eval():
    """Its rule wants `yes` or `no` and nothing else, so answers are these; its yes ratio is that of the labels, not of
    the answers.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    spec = importlib.util.spec_from_file_location(
        "lmms_pope", Path(spec.submodule_search_locations[0]) / "tasks/pope/utils.py"
    )
    lmms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lmms)
    there = [bool(n % 2) for n in range(60)]
    said = [n % 7 in (1, 2, 4) or n % 3 == 0 for n in range(60)]
    rows = [
        lmms.pope_process_results({"question_id": n, "answer": "yes" if t else "no"}, ["yes" if s else "no"])[
            "pope_accuracy"
        ]
        for n, (t, s) in enumerate(zip(there, said, strict=True))
    ]
    ours = pope.rates(pope.counts(there, said).sum(0))
    for name, theirs in (
        ("accuracy", "accuracy"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("f1", "f1_score"),
    ):
        assert ours[name] == pytest.approx(100 * getattr(lmms, f"pope_aggregate_{theirs}")(rows))
    assert ours["yes"] == pytest.approx(100 * sum(said) / 60) and lmms.pope_aggregate_yes_ratio(rows) == sum(there) / 60
