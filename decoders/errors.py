"""What the loop says when it cannot do what was asked."""

import difflib
from collections.abc import Iterable


class StackError(ValueError):
    """A stack, a model and a request that do not go together; the message says what to do."""


def choices(given: object, valid: Iterable[str], what: str) -> str:
    """A sentence that names the nearest valid name and lists them all."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {what} '{given}'.{hint} Valid: {', '.join(valid) or 'none'}."
