"""What the loop says when it cannot do what was asked."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class StackError(ValueError):
    """A stack, a model and a request that do not go together; the message says what to do."""


def choices(given: object, valid: Iterable[str], what: str) -> str:
    """A sentence that names the nearest valid name and lists them all."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {what} '{given}'.{hint} Valid: {', '.join(valid) or 'none'}."


@contextmanager
def in_hook(decoder: Any, hook: str, step: int | None = None) -> Iterator[None]:
    """Errors raised within get a note that says whose hook it was.

    Args:
        step: the number of the forward, counted from 1, which is the prefill; None where a hook has none.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"in decoder '{decoder.name}', hook {hook}{'' if step is None else f', step {step}'}")
        raise
