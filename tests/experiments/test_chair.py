"""CHAIR: what is found in a caption, what is counted, and agreement with lmms-eval's implementation."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.metrics import chair
from experiments.scenes import language, world


@pytest.mark.parametrize(
    "text, found",
    [
        ("Two men sit at a dining table.", ["person", "dining table"]),
        ("hot dogs, knives and wine glasses", ["hot dog", "knife", "wine glass"]),
        ("a toilet seat", ["toilet"]),
        ("The seat of the toilet", ["toilet"]),
        ("a baby elephant near a passenger train", ["elephant", "train"]),
        ("mice, geese, oxen and buses", ["mouse", "bird", "cow", "bus"]),
        ("A hot. Dog.", ["dog"]),
        ("Nothing to see", []),
        ("the dog's bowl, a man's hand", ["dog", "bowl", "person"]),
        ("a hot-dog", []),
        ("A STOP SIGN", ["stop sign"]),
        ("home plate", []),
    ],
)
def test_objects_found(text, found):
    assert [m.category for m in chair.mentions(text)] == found


@pytest.mark.parametrize("category", sorted(set(chair.CATEGORY.values())))
def test_every_category_and_its_plural(category):
    plural = {"person": "people", "skis": "skis", "scissors": "scissors"}.get(category) or language.plural(category)
    for word in (category, plural):
        words = word.removeprefix("pairs of ")
        assert [(m.category, m.words) for m in chair.mentions(f"there: {word}.")] == [(category, words)]


def test_mentions_say_where_they_stand():
    text = "A dog and two teddy bears."
    assert [text[m.start : m.end] for m in chair.mentions(text)] == ["dog", "teddy bears"]


def test_counts():
    a = chair.score("A dog, a dog and a cat.", ["dog", "car"])
    b = chair.score("A car.", ["car"])
    out = chair.summary([a, b])
    assert out["n"] == 2
    expected = dict(
        chair_s=50,
        chair_i=100 / 4,
        chair_i_unique=100 / 3,
        recall=100 * 2 / 3,
        precision=100 * 2 / 3,
        f1=100 * 2 / 3,
        words=4.5,
        mentions=2,
    )
    for name, value in expected.items():
        assert out[name]["value"] == pytest.approx(value), name
        assert out[name]["low"] <= value + 1e-9 and out[name]["high"] >= value - 1e-9


def test_difference_of_a_run_from_itself_is_nothing():
    scores = [chair.score("A dog.", ["dog"]), chair.score("A cat and a dog.", ["dog"])]
    assert all(v == {"value": 0, "low": 0, "high": 0, "p": 1} for v in chair.difference(scores, scores).values())
    with pytest.raises(ValueError, match="same images"):
        chair.difference(scores, scores[:1])


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for i in range(60):
        scores = [chair.score("A dog." if rng.random() < 0.7 else "A cat.", ["dog"]) for _ in range(80)]
        interval = chair.summary(scores, draws=300, seed=i)["chair_s"]
        hits += interval["low"] <= 30 <= interval["high"]
    assert 50 <= hits <= 60


@pytest.mark.parametrize(
    "text, left", [("A dog. A ca", "A dog."), ("A dog.", "A dog."), ("A do", ""), ('He said "hi."', 'He said "hi."')]
)
def test_unfinished_sentence_is_dropped(text, left):
    assert chair.drop_unfinished(text) == left
    assert chair.score("A dog. A cat and", ["dog"], unfinished="drop").hallucinated == set()


@given(st.text(max_size=80))
def test_any_text_is_scored(text):
    assert chair.summary([chair.score(text, ["dog"])], draws=5)["n"] == 1


SLIPS = {
    "motor bike": "motorcycle",
    "cheesecake": "cake",
    "iphone": "cell phone",
}  # lmms-eval's table has a space or a capital too many here


def _captions() -> list[str]:
    rng = np.random.default_rng(5)
    words = sorted(({w for w in chair.CATEGORY if w.isalpha()} | set(chair.DOUBLE)) - set(SLIPS))
    filler = ["near", "and a", "with the", "beside", "in front of", "under two", "blue", "running past the"]
    made = [
        " ".join(
            f"{filler[rng.integers(len(filler))]} {words[rng.integers(len(words))]}" for _ in range(rng.integers(2, 9))
        )
        + "."
        for _ in range(200)
    ]
    return made + [language.caption(world.draw("test", "typical", i)) for i in range(100)]


def _lmms(monkeypatch):
    """lmms-eval's own CHAIR; its tokeniser and lemmatiser need NLTK data, so they are stood in for by the ones under
    test.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval)")
    nltk, corpus, stem = (types.ModuleType(n) for n in ("nltk", "nltk.corpus", "nltk.stem"))
    nltk.word_tokenize = lambda text: re.findall(r"[a-z]+(?:-[a-z]+)*|[^a-z\s]", text)
    nltk.pos_tag = lambda tokens: [(t, "NN") for t in tokens]
    corpus.wordnet = types.SimpleNamespace(ADJ="a", VERB="v", NOUN="n", ADV="r")
    stem.WordNetLemmatizer = lambda: types.SimpleNamespace(lemmatize=lambda word, pos: chair.singular(word))
    for name, module in (("nltk", nltk), ("nltk.corpus", corpus), ("nltk.stem", stem)):
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(spec.submodule_search_locations[0]) / "tasks/coco_cap_chair/utils.py"
    spec = importlib.util.spec_from_file_location("lmms_chair", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agreement_with_lmms_eval(monkeypatch):
    lmms, captions = _lmms(monkeypatch), _captions()
    truth = [world.draw("test", "typical", i % 100).objects for i in range(len(captions))]
    assert len(captions) >= 200
    for word, category in SLIPS.items():
        assert [m.category for m in chair.mentions(word)] == [category] and lmms.caption_to_words(word)[1] == []
    for text in captions:
        assert [m.category for m in chair.mentions(text)] == lmms.caption_to_words(text)[1], text
    rows = [{"answer": t, "pred": lmms.caption_to_words(c)[1]} for c, t in zip(captions, truth, strict=False)]
    ours = chair.summary([chair.score(c, t) for c, t in zip(captions, truth, strict=False)], draws=2)
    for name in ("chair_s", "chair_i", "recall"):
        theirs = getattr(lmms, f"coco_cap_chair_aggregate_results_{name}")(rows)
        assert ours[name]["value"] == pytest.approx(theirs)


def test_command_scores_a_file(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps({"caption": "A dog and a cat.", "objects": ["dog"]}) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.metrics.chair", str(file)], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["captions"]["chair_i"]["value"] == 50
    for text, words in (
        ('{"text": 1}', "a line needs"),
        ("\n{", "line 2 is no JSON"),
        ("3", "found 3"),
        ('{"caption": "x", "objects": null}', "it is not null"),
    ):
        file.write_text(text + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "experiments.metrics.chair", str(file)], capture_output=True, text=True
        )
        assert done.returncode == 2 and f"{file}, line" in done.stderr and words in done.stderr


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"caption": "a dog", "objects": ["dgo"]}', "Did you mean 'dog'"),
        ('{"caption": null, "objects": ["dog"]}', "are texts"),
        ('{"caption": "a dog", "objects": [["dog"]]}', "COCO category"),
        ("", "holds no captions"),
    ],
)
def test_a_file_that_cannot_be_scored_says_why(tmp_path, line, said):
    (tmp_path / "c.jsonl").write_text(line)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.metrics.chair", str(tmp_path / "c.jsonl")], capture_output=True, text=True
    )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_objects_may_be_written_as_people_do(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"caption": "a dog and a\\u2028 couch", "objects": ["Puppy", "Sofa"]}', encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "experiments.metrics.chair", str(tmp_path / "c.jsonl")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["captions"]["chair_s"]["value"] == 0
