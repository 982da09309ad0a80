"""Checks of a decoder's options: an error names the decoder, the option, what it may be, and the nearest value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .errors import StackError, choices


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    decoder: Any, option: str, least: float = -math.inf, most: float = math.inf, optional: bool = False
) -> None:
    """The option is a number from `least` to `most`, both included; or None, where that may be.

    Raises:
        StackError: if it is not.
    """
    value = getattr(decoder, option)
    if (optional and value is None) or (is_number(value) and least <= value <= most):
        return
    _refuse(decoder, option, "a number", value, least, most, optional)


def check_integer(
    decoder: Any, option: str, least: float = -math.inf, most: float = math.inf, optional: bool = False
) -> None:
    """The same for an integer."""
    value = getattr(decoder, option)
    if (optional and value is None) or (is_integer(value) and least <= value <= most):
        return
    _refuse(decoder, option, "an integer", value, least, most, optional)


def check_flag(decoder: Any, option: str) -> None:
    """The option is true or false.

    Raises:
        StackError: if it is not.
    """
    if not isinstance(getattr(decoder, option), bool):
        raise StackError(f"{decoder.name}: {option} is true or false, not {getattr(decoder, option)!r}")


def check_choice(decoder: Any, option: str, valid: Sequence[str]) -> None:
    """The option is one of `valid`.

    Raises:
        StackError: naming the nearest.
    """
    if getattr(decoder, option) not in valid:
        raise StackError(f"{decoder.name}: {choices(getattr(decoder, option), valid, option)}")


def _refuse(decoder: Any, option: str, kind: str, value: Any, least: float, most: float, optional: bool) -> None:
    words = {
        (False, False): "",
        (True, False): f" >= {least:g}",
        (False, True): f" <= {most:g}",
        (True, True): f" in [{least:g}, {most:g}]",
    }[least > -math.inf, most < math.inf]
    nearest = ""
    if is_number(value):
        inside = min(most, max(least, value if kind == "a number" else round(value)))
        nearest = f"; the nearest valid value is {inside:g}"
    or_none = " or none" if optional else ""
    raise StackError(f"{decoder.name}: {option} is {kind}{words}{or_none}, not {value!r}{nearest}")
