"""What contrastive decoders share: the difference of two sets of scores, and the plausibility constraint."""

from __future__ import annotations

import math

from torch import Tensor


def contrast(scores: Tensor, other: Tensor, alpha: float) -> Tensor:
    """(1 + alpha) scores - alpha other, float32 [n, v]; what is impossible in `scores` stays so."""
    return ((1 + alpha) * scores - alpha * other).masked_fill(scores == -math.inf, -math.inf)


def plausible(scores: Tensor, changed: Tensor, beta: float) -> Tensor:
    """`changed`, [n, v], in which a token is impossible where `scores` < log(beta) + max `scores`.

    Args:
        scores: of the main rows, which decide.
        beta: how likely a token must be, as a share of the likeliest, in [0, 1]; 0 leaves all.
    """
    if not beta:
        return changed
    return changed.masked_fill(scores < math.log(beta) + scores.amax(-1, keepdim=True), -math.inf)
