"""Decoders of other papers, and controls; one file each."""

from .opera import OPERA

__all__ = ["OPERA"]
