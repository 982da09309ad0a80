"""The names that are used most in one place: `from prunehal import Stack, PruneHal, OPERA, VCD, DoLa, DeCo`.

The loop and what a decoder is made of are in the package `decoders`, the other methods in `baselines`; each name is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from decoders.errors import StackError

if TYPE_CHECKING:
    from baselines import OPERA, VCD, DeCo, DoLa
    from decoders import (
        AttentionView,
        Branch,
        CacheView,
        Candidates,
        Decoder,
        Edits,
        ForwardView,
        GenerationContext,
        RawInputs,
        Requirements,
        Rollback,
        Stack,
        Step,
        persistent,
    )

    from .prunehal import PruneHal

_MODULES = {
    "baselines": ("DeCo", "DoLa", "OPERA", "VCD"),
    "decoders": (
        "AttentionView",
        "Branch",
        "CacheView",
        "Candidates",
        "Decoder",
        "Edits",
        "ForwardView",
        "GenerationContext",
        "RawInputs",
        "Requirements",
        "Rollback",
        "Stack",
        "Step",
        "persistent",
    ),
    "prunehal.prunehal": ("PruneHal",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OPERA",
    "VCD",
    "AttentionView",
    "Branch",
    "CacheView",
    "Candidates",
    "DeCo",
    "Decoder",
    "DoLa",
    "Edits",
    "ForwardView",
    "GenerationContext",
    "PruneHal",
    "RawInputs",
    "Requirements",
    "Rollback",
    "Stack",
    "StackError",
    "Step",
    "persistent",
]
