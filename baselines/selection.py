"""What decoders that choose among slots share."""

from __future__ import annotations

import math

from torch import Tensor


def rank(values: Tensor, among: Tensor, descending: bool) -> Tensor:
    """long [..., t]: the place of each of the slots `among`, bool [..., t], in the order of `values`, float [..., t],
    counted from 0; of equals the earlier slot first. Other slots come after them.
    """
    last = -math.inf if descending else math.inf
    return values.masked_fill(~among, last).argsort(dim=-1, descending=descending, stable=True).argsort(dim=-1)
