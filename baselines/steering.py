"""What decoders that steer share: a push on the direction of a vector, whose length stays."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def turned(x: Tensor, push: Tensor) -> Tensor:
    """hat(hat(x) + push) |x|, with hat(x) = x / |x| over the last axis.

    Args:
        x: float32 [..., d].
        push: of a shape that fits, relative to a length of 1.
    """
    return F.normalize(F.normalize(x, dim=-1) + push, dim=-1) * x.norm(dim=-1, keepdim=True)
