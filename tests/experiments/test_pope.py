"""POPE's questions, its way of reading answers, and its metrics, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.metrics import pope

OBJECTS = {
    "a": ["cat", "dog", "car"],
    "b": ["cat", "dog", "bed"],
    "c": ["cat", "bus", "car"],
    "d": ["tie"],
    "e": ["cat", "dog", "tv"],
    "f": ["bus", "tie", "tv"],
}


@pytest.mark.parametrize("split", pope.SPLITS)
def test_as_many_there_as_not(split):
    probes = pope.probes(OBJECTS, split)
    assert {p.image for p in probes} == set(OBJECTS) - {"d"}  # which has too few
    for image in set(OBJECTS) - {"d"}:
        mine = [p for p in probes if p.image == image]
        assert len(mine) == len(set(mine)) == 6
        assert all((p.name in OBJECTS[image]) == p.there for p in mine) and sum(p.there for p in mine) == 3


def test_popular_ones_are_the_most_frequent_not_there():
    asked = [p.name for p in pope.probes(OBJECTS, "popular") if p.image == "f" and not p.there]
    assert asked == ["cat", "dog", "car"]  # 4, 3 and 2 pictures; bus, tie and tv are there


def test_adversarial_ones_stand_beside_what_is_there():
    probes = pope.probes(OBJECTS, "adversarial", per_image=1)
    assert [p for p in probes if p.image == "d"] == [
        pope.Probe("d", "tie", True),
        pope.Probe("d", "bus", False),
    ]  # with the tie in f: bus and tv
    there, other = [p.name for p in probes if p.image == "b"]
    assert (
        other == {"cat": "car", "dog": "car", "bed": "bus"}[there]
    )  # what most often stands beside, of those not in b


def test_what_is_counted_may_be_another_set():
    probes = pope.probes({"x": ["bed"]}, "adversarial", per_image=1, counted=OBJECTS)
    assert [p.name for p in probes] == ["bed", "cat"]  # as often beside a bed as the dog, and more often at all


def test_random_ones_depend_on_the_seed_alone():
    assert (
        pope.probes(OBJECTS, "random", seed=1)
        == pope.probes(OBJECTS, "random", seed=1)
        != pope.probes(OBJECTS, "random", seed=2)
    )


def test_unknown_split():
    with pytest.raises(ValueError, match="valid: random, popular, adversarial"):
        pope.probes(OBJECTS, "famous")


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes, there is a dog.", True),
        ("No.", False),
        ("no, there is none", False),
        ("There is not a dog in it.", False),
        ("A dog. No cat.", True),
        ("Nothing like a note.", True),
        ("", True),
    ],
)
def test_answers(answer, said):
    assert pope.yes(answer) == said


def test_metrics_by_hand():
    probes = [
        pope.Probe("a", "cat", True),
        pope.Probe("a", "bus", False),
        pope.Probe("b", "bed", True),
        pope.Probe("b", "tv", False),
        pope.Probe("b", "bus", False),
    ]
    got = pope.summary(
        probes, [True, True, False, False, False]
    )  # one true yes, one false yes, one false no, two true no
    assert got["n"] == 5
    assert {m: got[m]["value"] for m in pope.METRICS} == pytest.approx(
        {"accuracy": 60, "precision": 50, "recall": 50, "f1": 50, "yes": 40}
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_value_lies_in_its_interval(rows):
    got = pope.summary([pope.Probe(i, "cat", t) for i, t, _ in rows], [s for *_, s in rows], draws=200)
    assert got["accuracy"]["value"] == pytest.approx(100 * sum(t == s for _, t, s in rows) / len(rows))
    assert got["accuracy"]["low"] - 1e-9 <= got["accuracy"]["value"] <= got["accuracy"]["high"] + 1e-9
