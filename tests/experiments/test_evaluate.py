"""The numbers of the card, on made-up captions whose right answers are known; and the card itself."""

import json

import numpy as np
import pytest
import torch

from decoders import Stack
from experiments import models
from experiments.metrics import chair
from experiments.metrics.bootstrap import auc, share, weights
from experiments.probes.watch import Watch
from experiments.results import Results
from experiments.scenes import card, card_tables, evaluate, language, world


def row(caption, scene, tokens=40, layers=2, attention=None):
    found = chair.mentions(caption)
    told = [{"object": m.category, "token": i, "words": m.words} for i, m in enumerate(found)]
    by_layer = attention if attention is not None else np.full((tokens, layers), 0.5).tolist()
    return {
        "caption": caption,
        "tokens": tokens,
        "mentions": told,
        "objects": scene.objects,
        "hallucinated": sorted({m.category for m in found} - set(scene.objects)),
        "attention_by_layer": by_layer,
    }


def scenes(count=40):
    return [s for s in evaluate.scenes("validation", "typical", count) if len(s.objects) >= 3]


def test_true_captions_are_all_right():
    found = scenes()
    got = evaluate.said(found, [row(language.caption(s), s) for s in found])
    assert got["chair_i"]["value"] == 0 and got["recall"]["value"] == 100
    assert {k: v["value"] for k, v in got["claims"].items()} == {
        k: 100.0 for k in ("position", "colour", "size", "count", "relation")
    }


def test_captions_of_other_pictures_are_wrong():
    found = scenes()
    other = evaluate.shuffled(found)
    assert all(a.kind != b.kind for a, b in zip(found, other, strict=False))
    got = evaluate.said(found, [row(language.caption(o), s) for s, o in zip(found, other, strict=False)])
    assert (
        got["chair_s"]["value"] > 90
        and got["claims"]["position"]["value"] < 40
        and got["claims"]["position"]["of_all"]["value"] < 10
    )


def test_recall_by_difficulty():
    found = scenes()
    seen = [", ".join(language.singular(t.name) for t in s.things if t.size >= 16) for s in found]
    got = evaluate.hard(found, [row(text, s) for text, s in zip(seen, found, strict=False)])
    assert got["tiny"]["value"] == 0 and got["tiny"]["n"] > 5 and got["plain to see"]["value"] == 100
    assert got["plain to see, held-out drawing"]["n"] == 0  # there is none in the validation split


def test_what_goes_along_a_caption():
    found = scenes()
    rows = []
    for s in found:
        absent = [n for n in world.CATEGORIES if n not in s.objects][:2]
        named = [*s.objects[:3], *absent]  # hallucinated last, with half the attention
        attention = [[0.6, 0.4]] * 3 + [[0.3, 0.2]] * 2
        rows.append(row(" ".join(f"There is {language.singular(n)}." for n in named), s, tokens=5, attention=attention))
    got = evaluate.along(found, rows)
    assert [v["value"] for v in got["by_order"][:5]] == [0, 0, 0, 100, 100] and got["by_order"][5]["n"] == 0
    assert got["by_step"][0]["value"] == pytest.approx(50) and got["by_step"][4]["value"] == pytest.approx(25)
    assert got["by_layer"][0]["true"]["value"] == pytest.approx(60) and got["by_layer"][1]["hallucinated"][
        "value"
    ] == pytest.approx(20)
    assert got["difference"]["value"] == pytest.approx(-25) and got["auc"]["value"] == 100


def test_the_difference_within_fifths_leaves_place_out():
    """Attention that only falls along the caption is no difference between true and hallucinated objects."""
    found = scenes()
    rng = np.random.default_rng(0)
    rows = []
    for s in found:
        absent = [n for n in world.CATEGORIES if n not in s.objects]
        named = []
        for k in range(5):  # more and more hallucinated
            named.append(absent.pop() if rng.random() < 0.15 + 0.15 * k else None)
        there = iter(s.objects * 2)
        named = [n or next(there) for n in named]
        attention = [[0.9 - 0.15 * k] * 2 for k in range(5)]
        rows.append(row(" ".join(f"There is {language.singular(n)}." for n in named), s, tokens=5, attention=attention))
    got = evaluate.along(found, rows)
    assert got["difference"]["high"] < 0 and got["difference_same_fifth"]["value"] == pytest.approx(0, abs=1e-9)


def test_auc():
    def value(true, false, captions=2):
        return auc(
            [(i % captions, kind, v) for kind, levels in ((False, true), (True, false)) for i, v in enumerate(levels)],
            weights(captions),
        )["value"]

    assert (
        value([3.0, 4.0], [1.0, 2.0]) == 100
        and value([1.0], [1.0]) == 50
        and value([1.0], [2.0]) == 0
        and value([1.0, 3.0], [2.0, 0.0]) == 75
    )
    assert np.isnan(value([], [1.0])) and np.isnan(value([], []))


def test_the_interval_of_auc_is_by_caption():
    """Ten copies of each object in its caption tell no more than one of it."""
    rng = np.random.default_rng(0)
    once = [(i, kind, float(rng.normal(-kind))) for i in range(60) for kind in (False, True)]
    draw = weights(60)
    assert auc(once, draw) == pytest.approx(auc(once * 10, draw))
    assert auc(once, draw)["low"] < auc(once, draw)["value"] < auc(once, draw)["high"]


def test_a_fifth_without_true_objects_is_left_out():
    """Where all are hallucinated there is nothing to compare with, which is no difference of nothing."""
    sums = np.zeros((2, 2, 2))  # fifth; true, hallucinated; attention of the one layer, number
    sums[0] = [(6, 10), (2, 5)]
    sums[1, 1] = (1, 50)
    assert evaluate._within(sums) == pytest.approx(40 - 60)


def test_shares_are_drawn_by_picture():
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 60) * 10  # all ten or none of a picture: no more than 60 things are known
    wide = share(hits, np.full(60, 10))
    narrow = share(rng.binomial(10, 0.5, 60), np.full(60, 10))
    assert wide["n"] == 600 and (wide["high"] - wide["low"]) > 2 * (narrow["high"] - narrow["low"])


@pytest.mark.parametrize(
    "kind, answer, text, right",
    [
        ("colour", "red", "The car is red.", True),
        ("colour", "red", "The car is red and blue.", False),
        ("count", "two", "There are two dogs.", True),
        ("count", "two", "There is one dog.", False),
        ("position", "at the top", "The cup is at the top left.", False),
        ("position", "at the top left", "The cup is in the top left corner.", True),
        ("position", "on the left", "", False),
        ("count", "one", "There are cell phones.", False),
    ],
)
def test_answers_are_read(kind, answer, text, right):
    assert evaluate.correct(language.Question(kind, "cup", "?", "", answer), text) == right


class Seer:
    """In the place of a model: it answers rightly of the things in the picture that it is shown."""

    def answers(self, asked, longest=20):
        return [q.sentence if q.name in scene.objects else f"No, there is no {q.name}." for scene, q in asked]


def test_questions_are_asked_of_the_picture_shown():
    found = scenes()
    right, blind = evaluate.asked(Seer(), found, found), evaluate.asked(Seer(), found, found, evaluate.emptied(found))
    assert all(right[split]["accuracy"]["value"] == 100 for split in ("random", "popular", "adversarial"))
    assert all(
        right[kind]["value"] == 100 and right[kind]["n"] > 5
        for kind in ("colour", "count", "count, several", "position")
    )
    assert all(
        blind[split]["accuracy"]["value"] == 50 and blind[split]["yes"]["value"] == 0
        for split in ("random", "popular", "adversarial")
    )
    assert blind["colour"]["value"] == blind["position"]["value"] == 0


def test_watching_changes_nothing_and_sees_the_whole_attention():
    model, processor = models.load(models.entry("scenes"))
    inputs = models.encode(
        processor,
        [world.render(s) for s in evaluate.scenes("validation", "typical", 3)],
        language.CAPTION_PROMPT,
        "cpu",
    )
    stack = Stack([Watch()])
    out = stack.generate(model, **inputs, max_new_tokens=30, do_sample=False)
    assert out.equal(Stack([]).generate(model, **inputs, max_new_tokens=30, do_sample=False))
    model.set_attn_implementation("eager")
    try:
        whole = inputs | {"input_ids": out, "attention_mask": torch.ones_like(out)}
        attention = model(**whole, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    prompt, visual = inputs["input_ids"].shape[1], inputs["input_ids"] == model.config.image_token_id
    for i, told in enumerate(stack.record["watch"]):
        seen = told["row"]["attention_by_layer"]
        assert len(seen) >= 20
        for step, by_layer in enumerate(
            seen[:20]
        ):  # the forward that makes token `step` has the one before it for its newest
            expected = [layer[i, :, prompt + step - 1].mean(0)[:prompt][visual[i]].sum().item() for layer in attention]
            assert by_layer == pytest.approx(expected, abs=1e-4)


def test_watching_takes_beams():
    model, processor = models.load(models.entry("scenes"))
    inputs = models.encode(
        processor,
        [world.render(s) for s in evaluate.scenes("validation", "typical", 2)],
        language.CAPTION_PROMPT,
        "cpu",
    )
    stack = Stack([Watch()])
    stack.generate(model, **inputs, max_new_tokens=8, num_beams=2, do_sample=False)
    assert [len(told["row"]["attention_by_layer"]) for told in stack.record["watch"]] == [
        7,
        7,
    ]  # the last token needs no look


def test_together():
    table = evaluate.together([["fork", "knife"], ["fork"], ["cat", "cat"]])
    at = world.CATEGORIES.index
    assert (
        table[at("fork"), at("knife")] == 0.5
        and table[at("knife"), at("fork")] == 1
        and table[at("cat"), at("cat")] == 1
    )


def test_what_has_no_number_misses_its_target():
    """A model that names nothing, or hallucinates nothing, has a card all the same."""
    none = {"value": None}
    asked = {split: {"accuracy": none, "yes": none} for split in ("random", "popular", "adversarial")}
    forms = {
        form: {"recall": none, "chair_s": none, "chair_i_unique": {"value": value}, "claims": {"position": none}}
        for form, value in (("typical", 0.0), ("absent", 1.0))
    }
    assert not any(held for _, _, held in card_tables.targets({"forms": forms, "questions": {"typical": asked}}))


def test_the_card_holds_what_was_measured():
    assert card.text() in (card.FOLDER.parent / "README.md").read_text()
    assert {f.stem for f in card.FOLDER.glob("*.json")} == {"shipped", "seed0", "seed2"}
    assert (card.FOLDER / "phenomenon.png").exists() and (card.FOLDER / "priors.png").exists()


@pytest.mark.parametrize("name", ["shipped", "seed0", "seed2"])
def test_the_weights_are_within_the_targets(name):
    numbers = json.loads((card.FOLDER / f"{name}.json").read_text())
    assert numbers["count"] >= 1000
    assert all(held for _, _, held in card_tables.targets(numbers)), card_tables.targets(numbers)


def test_the_model_measures_what_its_card_says(tmp_path):
    """Fewer pictures than the card's, so the measures are within what 40 of them can show."""
    bench = evaluate.Bench(None, Results(tmp_path / "answers.sqlite"))
    found = evaluate.scenes("test", "typical", 40)
    told = evaluate.said(found, bench.captions("typical", evaluate.PLAIN, evaluate.items(found)))
    on_card = json.loads((card.FOLDER / "shipped.json").read_text())["forms"]["typical"]
    for measure in ("recall", "chair_i_unique", "f1"):
        assert told[measure]["low"] <= on_card[measure]["value"] <= told[measure]["high"], measure
