"""CHAIR that reads the words around a name: what is denied, a colour, a verb, an idiom, a toy or a picture of a thing
does not count, and names that the published list lacks do.

It stands beside the published rule (`chair.py`), which it does not replace: numbers of papers are of that one. The
rules are few and go by words alone, since every tagger of parts of speech needs a model of its own to be fetched, and
would settle the verbs only. `chair_context.json` holds the words.

`python -m experiments.metrics.chair_context "A caption."` prints what is found in it, and why the rest does not count;
`mention_labels.py` how well both rules find the mentions that are marked in labelled sentences.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import chair
from .chair import Mention
from .words import plural, singular

_WORDS = json.loads((Path(__file__).parent / "chair_context.json").read_text(encoding="utf-8"))
_KIND = {kind: set(words.split()) for kind, words in _WORDS["kinds"].items()}


def _names() -> dict[str, str]:
    """Every name of a category, one and many: those of the published list that stay, and those that it lacks."""
    names = dict(chair.CATEGORY)
    names |= {two: chair.CATEGORY[one] for two, one in chair.DOUBLE.items() if one in chair.CATEGORY}
    names |= {name: category for category, added in _WORDS["names"].items() for name in added}
    names |= {plural(name): category for name, category in names.items()}
    return {name: category for name, category in names.items() if singular(name) not in _WORDS["no_names"]}


NAMES = _names()
_LONGEST = max(len(name.split()) for name in [*NAMES, *_WORDS["phrases"]]) + 1  # 's is a token of its own
_PHRASES, _DENYING, _LIKENING, _VERBS, _TOYS, _FIGURINES = (
    frozenset(_WORDS[kind]) for kind in ("phrases", "denying", "likening", "verbs", "toys", "figures")
)
_FIRST = {re.split(r"[ '-]", words)[0] for words in [*NAMES, *_PHRASES, *_DENYING, *_LIKENING]}
_HEADS = {category: {*_WORDS["heads"]["*"], *_WORDS["heads"].get(category, ())} for category in NAMES.values()}
_FIGURES = {many for word in _WORDS["pictures"] for many in (word, plural(word))}
_PHOTOGRAPHS = {many for word in _WORDS["photographs"] for many in (word, plural(word))}

_BE, _INDEFINITE, _DEFINITE, _PRONOUNS, _BREAKS = (
    _KIND[k] for k in ("be", "indefinite", "definite", "pronouns", "breaks")
)
_PREPOSITIONS = _KIND["prepositions"]
_AUXILIARY = _BE | _KIND["auxiliary"]
_ANY = frozenset({"a", "an", "any"})
_DETERMINERS = _INDEFINITE | _DEFINITE | _KIND["numbers"]
_PUNCTUATION = set(',.;:!?()"')
_ENDS = _PREPOSITIONS | _AUXILIARY | _BREAKS | _PUNCTUATION | _PRONOUNS
_FUNCTION = _ENDS | _DETERMINERS | {"and", "or", "of", "'s"}
_NOT = re.compile(r"not|never|cannot|[a-z]+n't")
_TOKEN = re.compile(r"[a-z]+n['’]t|['’]s\b|[a-z]+(?:-[a-z]+)*|[,.;:!?()\"]", re.I)


@dataclass(frozen=True)
class Name:
    """Words of a caption that may name an object: tokens `start` to `end` of its sentence, `end` excluded."""

    start: int
    end: int
    category: str


@dataclass
class Sentence:
    """The tokens of a sentence in lower case, where they stand in the caption, and the names among them."""

    words: list[str]
    spans: list[tuple[int, int]]

    def __post_init__(self):
        self.names = list(self._find())

    def __getitem__(self, i: int) -> str:
        """The token at a place, a full stop beyond the ends."""
        return self.words[i] if 0 <= i < len(self.words) else "."

    def said(self, i: int, n: int) -> tuple[str, str]:
        """`n` tokens from the `i`-th on, as they are and each in the singular; a hyphen parts words."""
        words = [word.replace("-", " ") for word in self.words[i : i + n]]
        one = " ".join(singular(word) for word in words)
        return " ".join(words).replace(" 's", "'s"), one.replace(" 's", "'s")

    def _find(self) -> Iterator[Name]:
        """The longest names and fixed phrases, from the left; a phrase names nothing."""
        i = 0
        while i < len(self.words):
            longest = _LONGEST if _FIRST.intersection(re.split("[ -]", " ".join(self.said(i, 1)))) else 1
            for n in range(min(longest, len(self.words) - i), 0, -1):
                said = self.said(i, n)
                if not _PHRASES.isdisjoint(said):
                    break
                if category := NAMES.get(said[0]) or NAMES.get(said[1]):
                    yield Name(i, i + n, category)
                    break
            i += n

    def phrases(self, phrases: frozenset[str]) -> Iterator[int]:
        """Where each of these phrases ends, every time that it stands here."""
        for i in (i for i, word in enumerate(self.words) if word in _FIRST):
            yield from (i + n for n in range(1, _LONGEST + 1) if " ".join(self.words[i : i + n]) in phrases)

    def reach(self, i: int, passing: frozenset[str] = frozenset()) -> int:
        """Where the noun phrase that begins at a token ends, its further parts (`or ...`, `and ...`) included.

        passing: words that do not end it, though others of their kind do.
        """
        start = i
        while i < len(self.words):
            word, after = self[i], self.words[i + 1 : i + 5]
            listed = word == "," and (after[:1] and after[0] in passing or not {"or", "nor"}.isdisjoint(after))
            if i > start and word in _ENDS and word not in passing and not listed:
                break
            if word == "and" and after and after[0] in (_DETERMINERS | _PRONOUNS) - passing:
                break
            i += 1
        return i


def sentences(caption: str) -> Iterator[Sentence]:
    """The sentences of a caption; a semicolon ends one, too."""
    found = [(m.group().lower().replace("’", "'"), m.span()) for m in _TOKEN.finditer(caption)]
    start = 0
    for i, (word, _) in enumerate(found):
        if word in ".;!?" or i == len(found) - 1:
            words, spans = zip(*found[start : i + 1], strict=True)
            yield Sentence(list(words), list(spans))
            start = i + 1


def _scope(sentence: Sentence, after: Iterator[int], passing: frozenset[str] = frozenset()) -> set[int]:
    """The tokens of the noun phrases that begin at these places."""
    return {i for start in after for i in range(start, sentence.reach(start, passing))}


def denied(sentence: Sentence) -> set[int]:
    """Tokens that are said not to be there: after `no`, `without`, `instead of`; what is not done with an indefinite
    thing (`not wearing a tie`); and the subject of `is not visible`, `are absent`.
    """
    starts = [i for i in sentence.phrases(_DENYING) if sentence[i] not in {"one", "longer", "doubt"}]
    out = _scope(sentence, (i for i in starts if sentence[i - 1] == "no"))
    out |= _scope(sentence, (i for i in starts if sentence[i - 1] != "no"), _ANY)
    for i, word in enumerate(sentence.words):
        after = sentence.words[i + 1 : i + 3]
        gone = word in _BE and sentence[i + 1] in {"absent", "missing", "nowhere"}
        absent = gone and sentence[i + 2] not in _DETERMINERS
        if absent or (_NOT.fullmatch(word) and not _KIND["unseen"].isdisjoint(after)):
            out |= set(range(_clause(sentence, i), i))
        elif _NOT.fullmatch(word) and sentence[i + 1] not in _KIND["not denying"]:
            out |= _object(sentence, i)
    return {i for i in out if sentence[i + 1] != "'s"}  # the dog's tail is not there, but the dog


def _clause(sentence: Sentence, i: int) -> int:
    """Where the clause of a token begins."""
    while i > 0 and sentence[i - 1] not in _BREAKS | {",", "and", "while"}:
        i -= 1
    return i


def _object(sentence: Sentence, i: int) -> set[int]:
    """Tokens of the first indefinite noun phrase after a `not`, before its clause ends: `the` takes it for there."""
    while (i := i + 1) < len(sentence.words) and sentence[i] not in _BREAKS | _PUNCTUATION | _DEFINITE | {"while"}:
        if sentence[i] in _INDEFINITE or any(name.start == i for name in sentence.names):
            return set(range(i, sentence.reach(i, _ANY)))
    return set()


def pictured(sentence: Sentence) -> set[int]:
    """Tokens of what a picture or a figure shows: after `a statue of`; after `a photo of` only where the sentence says
    that something shows the photo, else it is the picture itself that is described.
    """
    out: set[int] = set()
    hung = not {"hangs", "hang", "hanging", "framed", "frame"}.isdisjoint(sentence.words)
    for i, word in enumerate(sentence.words):
        if sentence[i + 1] == "of" and word in _FIGURES | _PHOTOGRAPHS:
            elsewhere = (_PREPOSITIONS - {"in"}) | {"there", "holds", "holding", "has", "have"}
            if word in _FIGURES or hung or not elsewhere.isdisjoint(sentence.words[:i]):
                out |= _scope(sentence, iter([i + 2]), _ANY | {"with"})
    return out


def _likened(sentence: Sentence) -> Iterator[int]:
    """Where the noun phrases begin of what something is likened to, waits for, or is made for; `items like a cup` are
    cups.
    """
    for i in sentence.phrases(_LIKENING):
        if sentence[i - 2] != "like" or sentence[i - 3] not in _KIND["sorts"]:
            yield i


def _verb(sentence: Sentence, name: Name) -> bool:
    """Whether a word is a verb here: after a pronoun or `to`; or, not after what a noun follows, before an object; or
    ending in s after one person.
    """
    word, before, after = sentence[name.start], sentence[name.start - 1], sentence[name.end]
    stem = word.removesuffix("s")
    if name.end - name.start > 1 or not {word, stem} & _VERBS:
        return False
    if before in _PRONOUNS | {"can", "will", "would", "must", "could", "to"} and before != "that":
        return before != "to" or (word == stem and sentence[name.start - 2] not in {"next", "close", "attached"})
    if before not in _FUNCTION and after in _DETERMINERS:
        return True
    person = next((n for n in sentence.names if n.end == name.start and n.category == "person"), None)
    one = (
        person is not None
        and not sentence[person.end - 1].endswith("s")
        and sentence[person.start] not in _KIND["young"]
    )
    return one and word != stem and after in _FUNCTION


def _like_an_adjective(sentence: Sentence, name: Name) -> bool:
    """Whether a word says what another thing is like: a colour, or `male` before a noun."""
    word, before, after = sentence[name.start], sentence[name.start - 1], sentence[name.end]
    if name.end - name.start > 1 or word not in _KIND["adjectives"]:
        return False
    verb_after = after.endswith("ing") or (after.endswith("s") and before in {"a", "an", "one"})
    if word != "orange":
        return after not in _FUNCTION and not verb_after
    colours = after in {"and", ","} and sentence[name.end + 1] in _KIND["colours"] - {"orange"}
    described = before not in _FUNCTION and sentence[name.start - 2] in _DETERMINERS  # a small orange
    noun = before in _DETERMINERS | {"of", ",", "and", "or"} or described
    return colours or not noun or (after not in _FUNCTION and not verb_after)


def _kind_of_another(sentence: Sentence, name: Name) -> bool:
    """Whether a noun only says of what kind the next one is: `bus stop`, `truck driver`."""
    one = singular(sentence[name.end - 1]) == sentence[name.end - 1]
    follows = next((n for n in sentence.names if n.start == name.end), None)
    another = one and follows is not None and not _verb(sentence, follows) and not _like_an_adjective(sentence, follows)
    return (one and sentence[name.end] in _HEADS[name.category]) or another


def _toy(sentence: Sentence, name: Name) -> bool:
    """Whether a name is that of a toy or a figure: `toy car`, `wooden horse`, `bear statue`."""
    if name.category == "teddy bear":
        return False
    before = sentence[name.start - 1]
    alive = name.category in {"person", *_KIND["animals"]}
    return before in _TOYS or (alive and before in _FIGURINES) or sentence[name.end] in _FIGURES


def _another_sense(sentence: Sentence, name: Name) -> bool:
    """Whether other words of the sentence, or those before, give a word another meaning: a mouse that is chased, a
    turkey that is carved, football that is played.
    """
    word = sentence[name.start]
    played = word in _KIND["games"] and sentence[name.start - 1] in _KIND["play"]
    others = _WORDS["senses"].get(singular(word), ()) if name.end - name.start == 1 else ()
    return played or not set(others).isdisjoint(sentence.words)


def judged(caption: str) -> Iterator[tuple[Mention, str]]:
    """Every name in a caption, in order, and why it is no mention of an object, or nothing where it is one."""
    for sentence in sentences(caption):
        unreal = _scope(sentence, _likened(sentence), _ANY)
        scopes = {"denied": denied(sentence), "pictured": pictured(sentence), "likened or awaited": unreal}
        for name in sentence.names:
            start, end = sentence.spans[name.start][0], sentence.spans[name.end - 1][1]
            tests = {
                "a verb": _verb(sentence, name),
                "like an adjective": _like_an_adjective(sentence, name),
                "kind of another": _kind_of_another(sentence, name),
                "a toy or a figure": _toy(sentence, name),
                "another sense": _another_sense(sentence, name),
            } | {reason: name.start in tokens for reason, tokens in scopes.items()}
            yield (
                Mention(caption[start:end], name.category, start, end),
                next((reason for reason, holds in tests.items() if holds), ""),
            )


def mentions(caption: str) -> list[Mention]:
    """Every mention of a COCO object that says that the object is in the picture, in order."""
    return [mention for mention, reason in judged(caption) if not reason]


def score(caption: str, objects: Iterable[str]) -> chair.Score:
    """Count one caption against the COCO categories in its picture, as `chair.score` does."""
    return chair.Score(mentions(caption), set(objects), len(caption.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text", help="a caption")
    for mention, reason in judged(parser.parse_args().text):
        print(f"{mention.words}: {mention.category}{reason and f', does not count: {reason}'}")


if __name__ == "__main__":
    main()
