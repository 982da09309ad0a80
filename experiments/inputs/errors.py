"""Errors that a user can act on; shown without a traceback."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


class InputError(ValueError):
    """What was given, what was expected, and what to do."""


class PictureError(InputError):
    """A picture that a model's processor does not take."""


def say(error: BaseException) -> int:
    """Print an error, without a traceback; returns the exit code of what was refused."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
    return 2
