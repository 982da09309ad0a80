"""The decoding loop and the interface of its plugins. It knows no method by name.

Letters for shapes, everywhere: `b` images, `k` beams, `n` rows (= b*k), `m` rows with those of the branches, `c`
candidates, `h` heads, `q` query length, `t` cache slots, `v` vocabulary, `l` layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import StackError

if TYPE_CHECKING:
    from .beams import Finished, Hypotheses
    from .interface import Branch, Cached, Candidates, Decoder, Reads, Rollback, Run, Step, lasting
    from .stack import Stack
    from .state import put

# Imported when first used: they import torch and transformers, which takes seconds, and a misspelt name needs neither.
_MODULES = {
    "beams": ("Finished", "Hypotheses"),
    "interface": ("Branch", "Cached", "Candidates", "Decoder", "Reads", "Rollback", "Run", "Step", "lasting"),
    "stack": ("Stack",),
    "state": ("put",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Branch",
    "Cached",
    "Candidates",
    "Decoder",
    "Finished",
    "Hypotheses",
    "Reads",
    "Rollback",
    "Run",
    "Stack",
    "StackError",
    "Step",
    "lasting",
    "put",
]
