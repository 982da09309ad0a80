"""Checks of decoders' options: an error names the decoder, the option, what it may be, and the nearest value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .errors import StackError, choices


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    decoder: Any,
    option: str,
    least: float = -math.inf,
    most: float = math.inf,
    optional: bool = False,
    above: bool = False,
    meaning: str = "",
) -> None:
    """The option is a number from `least` to `most`, both included; or None, where that may be.

    Args:
        above: whether `least` is not included.
        meaning: what the option is, for the error.

    Raises:
        StackError: if it is not.
    """
    value = getattr(decoder, option)
    if optional and value is None:
        return
    if not is_number(value) or not least <= value <= most or (above and value == least):
        _refuse(decoder, option, "a number", least, most, optional, above, meaning)


def check_integer(
    decoder: Any,
    option: str,
    least: float = -math.inf,
    most: float = math.inf,
    optional: bool = False,
    meaning: str = "",
) -> None:
    """The same for an integer."""
    value = getattr(decoder, option)
    if not (optional and value is None) and not (is_integer(value) and least <= value <= most):
        _refuse(decoder, option, "an integer", least, most, optional, False, meaning)


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


def check_distinct(decoders: Sequence[Any]) -> None:
    """No decoder is given twice: the same instance, or another of its class with the same options.

    Raises:
        StackError: naming the decoder.
    """
    for i, one in enumerate(decoders):
        if any(one is other or _equal(one, other) for other in decoders[:i]):
            raise StackError(
                f"{one.name} is given twice with the same options; give it once, or give the second other options"
            )


def _equal(one: Any, other: Any) -> bool:
    """Whether both are of one dataclass, and all options are the same objects or equal plain values."""
    if type(one) is not type(other) or not is_dataclass(one):
        return False
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one) if f.compare]
    return all(a is b or (_is_plain(a) and _is_plain(b) and a == b) for a, b in pairs)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (str, int, float, Path)):
        return True
    return isinstance(value, Sequence) and all(map(_is_plain, value))


def _refuse(
    decoder: Any, option: str, kind: str, least: float, most: float, optional: bool, above: bool, meaning: str
) -> None:
    value, nearest = getattr(decoder, option), ""
    words = {
        (False, False): "",
        (True, False): f" {'>' if above else '>='} {least:g}",
        (False, True): f" <= {most:g}",
        (True, True): f" in {'(' if above else '['}{least:g}, {most:g}]",
    }[least > -math.inf, most < math.inf]
    if is_number(value) and above and value <= least:
        nearest = f"; the default is {getattr(type(decoder), option, None)}"
    elif is_number(value):
        inside = min(most, max(least, value if kind == "a number" else round(value)))
        nearest = f"; the nearest valid value is {inside:g}"
    what = f"{meaning}, {kind}" if meaning else kind
    or_none = " or none" if optional else ""
    raise StackError(f"{decoder.name}: {option} is {what}{words}{or_none}, not {value!r}{nearest}")
