"""PruneHal: adaptive pruning of visual tokens in the key-value cache."""

from .prunehal import PruneHal

__all__ = ["PruneHal"]
