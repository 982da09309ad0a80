"""Decoders of other papers, and controls; one file each."""

from .deco import DeCo
from .dola import DoLa
from .opera import OPERA
from .truncation import Truncation
from .vcd import VCD

__all__ = ["OPERA", "VCD", "DeCo", "DoLa", "Truncation"]
