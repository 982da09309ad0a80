"""Answers rated by another model over an OpenAI-compatible endpoint: `python -m experiments.judge`."""

from .endpoint import Endpoint
from .prompts import BENCHES, Bench, ratings
from .rating import SIDE, answers, judge, key, picture, rated, summary

__all__ = [
    "BENCHES",
    "SIDE",
    "Bench",
    "Endpoint",
    "answers",
    "judge",
    "key",
    "picture",
    "rated",
    "ratings",
    "summary",
]
