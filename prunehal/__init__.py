"""The public names in one place: `from prunehal import Stack, PruneHal, OPERA, PAI`.

The loop and what a decoder is made of are in the package `decoders`, the other methods in `baselines`; each name is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import baselines
import decoders
from decoders.errors import StackError

if TYPE_CHECKING:
    from baselines import (
        ICD,
        M3ID,
        ONLY,
        OPERA,
        PAI,
        SID,
        VCD,
        VISTA,
        VTI,
        AvisC,
        DeCo,
        DoLa,
        FastV,
        MemVR,
        Truncation,
    )
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


def __getattr__(name: str) -> Any:
    if name == "PruneHal":
        return importlib.import_module(".prunehal", __name__).PruneHal
    if name in __all__:
        return getattr(baselines if name in baselines.__all__ else decoders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "AttentionView",
    "AvisC",
    "Branch",
    "CacheView",
    "Candidates",
    "DeCo",
    "Decoder",
    "DoLa",
    "Edits",
    "FastV",
    "ForwardView",
    "GenerationContext",
    "ICD",
    "M3ID",
    "MemVR",
    "ONLY",
    "OPERA",
    "PAI",
    "PruneHal",
    "RawInputs",
    "Requirements",
    "Rollback",
    "SID",
    "Stack",
    "StackError",
    "Step",
    "Truncation",
    "VCD",
    "VISTA",
    "VTI",
    "persistent",
]
