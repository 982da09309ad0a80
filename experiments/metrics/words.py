"""Words, as far as the metrics and the scenes need them: nouns, one and many, with their article; words repeated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

# The plural forms of all words of CHAIR's synonym list, common misspellings among them, each with its singular: what
# inflect 7.6 makes of them, written down, since importing it takes seconds.
SINGULAR: dict[str, str] = json.loads((Path(__file__).parent / "plurals.json").read_text())
# endings of plurals, and those of the singular
_ENDINGS = {"men": ("man",), "children": ("child",), "feet": ("foot",), "teeth": ("tooth",), "geese": ("goose",)}
_ENDINGS |= {"mice": ("mouse",), "oxen": ("ox",), "ies": ("y", "ie"), "ves": ("f", "fe", "ve"), "es": ("", "e")}
_IRREGULAR = {"person": "people", "knife": "knives", "mouse": "mice", "sheep": "sheep"}


def singular(word: str) -> str:
    """The singular of a word of CHAIR's synonym list; any other word as it is."""
    return SINGULAR.get(word, word)


def singulars(word: str) -> Iterator[str]:
    """What the singular of a plural may be by its ending, the likeliest first; the word itself is none of them."""
    if word in SINGULAR:
        yield SINGULAR[word]
    for end, replacements in _ENDINGS.items():
        if word.endswith(end):
            yield from (word.removesuffix(end) + other for other in replacements)
    if word.endswith("s") and not word.endswith("ss"):
        yield word[:-1]


def plural(noun: str) -> str:
    """The plural of a noun, of whose words the last changes."""
    before, space, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    else:
        last += "es" if re.search(r"(s|x|z|ch|sh)$", last) else "s"
    return before + space + last


def with_article(words: str) -> str:
    """The words after `a` or `an`, by the first letter, which is right for all names and adjectives of the scenes."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def stuck_on(text: str, times: int) -> str | None:
    """The first word that stands at least so many times in a row, whatever its case and what is between; or None."""
    said = re.findall(r"\w+", text.lower())
    for i, word in enumerate(said[: len(said) - times + 1]):
        if said[i : i + times] == [word] * times:
            return word
    return None
