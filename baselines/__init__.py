"""Decoders of other papers, and controls; one file each."""

from __future__ import annotations

import importlib
from typing import Any

# Imported when first used: a stack of one decoder needs not the files of the others.
_MODULES = {
    "avisc": "AvisC",
    "deco": "DeCo",
    "dola": "DoLa",
    "fastv": "FastV",
    "icd": "ICD",
    "m3id": "M3ID",
    "memvr": "MemVR",
    "only": "ONLY",
    "opera": "OPERA",
    "pai": "PAI",
    "sid": "SID",
    "truncation": "Truncation",
    "vcd": "VCD",
    "vista": "VISTA",
    "vti": "VTI",
}


def __getattr__(name: str) -> Any:
    for module, known in _MODULES.items():
        if name == known:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [*_MODULES.values()]  # noqa: PLE0604  -- the names are strings
