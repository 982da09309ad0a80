"""The decoding loop and the interface of its plugins. It knows no method by name.

Letters for shapes, everywhere: `b` images, `k` beams, `n` rows (= b*k), `m` rows with those of the branches, `c`
candidates, `h` heads, `q` query length, `t` cache slots, `v` vocabulary, `l` layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import StackError

if TYPE_CHECKING:
    from .beams import BeamContinuations, Hypotheses
    from .interface import (
        Branch,
        CacheView,
        Candidates,
        Decoder,
        GenerationContext,
        Requirements,
        Rollback,
        Step,
        persistent,
    )
    from .stack import Stack
    from .tensors import pad_or_crop, write_at

# Imported when first used: they import torch and transformers, which takes seconds, and a misspelt name needs neither.
_MODULES = {
    "beams": ("BeamContinuations", "Hypotheses"),
    "interface": (
        "Branch",
        "CacheView",
        "Candidates",
        "Decoder",
        "Requirements",
        "Rollback",
        "GenerationContext",
        "Step",
        "persistent",
    ),
    "stack": ("Stack",),
    "tensors": ("pad_or_crop", "write_at"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Branch",
    "CacheView",
    "Candidates",
    "Decoder",
    "BeamContinuations",
    "Hypotheses",
    "Requirements",
    "Rollback",
    "GenerationContext",
    "Stack",
    "StackError",
    "Step",
    "persistent",
    "pad_or_crop",
    "write_at",
]
