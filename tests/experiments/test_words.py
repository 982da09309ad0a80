"""Plurals and articles, against what inflect 7.6 says (written down: it takes seconds to import)."""

import json
from pathlib import Path

import pytest

from experiments.metrics import chair, words
from experiments.scenes import world
from experiments.tasks import amber

EXPECTED = json.loads((Path(__file__).parent.parent / "golden" / "singulars.json").read_text())


def test_singular_equals_inflects_on_every_word_of_the_synonyms_and_its_plurals():
    assert len(EXPECTED) == 865
    assert {word: words.singular(word) for word in EXPECTED} == EXPECTED
    for word in {part for name in chair.CATEGORY for part in name.split()}:
        assert word in EXPECTED


@pytest.mark.parametrize("word", ["buses", "knives", "people", "skis", "this", "dress", "wineglasses", "unknowns"])
def test_words_that_are_no_plurals_of_the_list_stay(word):
    assert words.singular(word) == {"buses": "bus", "knives": "knife"}.get(word, word)


def test_plurals_of_categories():
    irregular = {"knife": "knives", "mouse": "mice", "sheep": "sheep", "person": "people", "bus": "buses"}
    irregular |= {"bench": "benches", "couch": "couches", "sandwich": "sandwiches", "wine glass": "wine glasses"}
    irregular |= {"toothbrush": "toothbrushes"}
    for name in sorted(set(chair.CATEGORY.values()) - {"scissors", "skis"}):
        assert words.plural(name) == irregular.get(name, f"{name}s")


def test_articles_of_categories_and_colours():
    vowels = {"airplane", "apple", "elephant", "orange", "oven", "umbrella"}
    for name in {*chair.CATEGORY.values(), *world.COLOURS}:
        assert words.with_article(name) == f"{'an' if name in vowels else 'a'} {name}"


def test_ambers_nouns_are_found_in_the_plural():
    vocabulary = {"puppy", "wolf", "knife", "box", "bus", "horse", "glass", "woman", "cookie", "sky", "leaf", "shoe"}
    text = "Puppies, wolves, knives, boxes, buses, horses, glasses, women, cookies, skies, leaves and shoes; no grass."
    assert set(amber.nouns(text, vocabulary)) == vocabulary
