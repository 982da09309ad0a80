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
    from .inside import AttentionView, ForwardView
    from .interface import Branch, Decoder, Edits, GenerationContext, Requirements, persistent
    from .raw_inputs import RawInputs
    from .stack import Stack
    from .tensors import pad_or_crop, write_at
    from .views import CacheView, Candidates, Rollback, Step

# Imported when first used: they import torch and transformers, which takes seconds, and a misspelt name needs neither.
_MODULES = {
    "beams": ("BeamContinuations", "Hypotheses"),
    "inside": ("AttentionView", "ForwardView"),
    "interface": ("Branch", "Decoder", "Edits", "Requirements", "GenerationContext", "persistent"),
    "raw_inputs": ("RawInputs",),
    "stack": ("Stack",),
    "tensors": ("pad_or_crop", "write_at"),
    "views": ("CacheView", "Candidates", "Rollback", "Step"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionView",
    "Branch",
    "CacheView",
    "Candidates",
    "Decoder",
    "BeamContinuations",
    "Edits",
    "ForwardView",
    "Hypotheses",
    "RawInputs",
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
