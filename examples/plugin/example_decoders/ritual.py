"""RITUAL: listen also to what the model says of a randomly transformed view of the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.options import check_choice, check_integer, check_number
from prunehal import Branch, Decoder, RawInputs, Requirements, StackError, Step

VIEWS = ("mirror", "upside_down", "turn", "crop", "contrast")


@dataclass
class RITUAL(Decoder):
    """Add the logits of a second view of the picture: what both views say wins over what only one of them says.

    The rows run a second time beside themselves, on a transformed picture. With scores l on the picture and logits l'
    on the second view,

        l + alpha * l'.

    After RITUAL, https://arxiv.org/abs/2405.17821, written from the idea and not from the official code: here the
    transformations act on the pixels that the processor made, their ranges and the default of alpha are chosen here,
    and there is no plausibility constraint. A pruner prunes the second view by that view's own attention, since what it
    shows stands elsewhere. Costs a branch as long as the prompt (rows twice); none with `alpha` 0.

    Args:
        alpha: weight of the second view, >= 0; 0 for none.
        view: `mirror`, `upside_down`, `turn` (by any angle), `crop` (to 0.5 to 0.9 of each side), `contrast` (0.3 to
            1.7 times), or `random`, which draws one of them for each image.
        seed: of the draws, >= 0, together with each image's seed.

    Raises:
        StackError: for a value out of range, and for inputs other than one picture a prompt, [colours, height, width].
    """

    alpha: float = 1.0
    view: str = "random"
    seed: int = 0

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_choice(self, "view", ("random", *VIEWS))
        check_integer(self, "seed", 0)

    def requirements(self, model: Any) -> Requirements:
        if not self.alpha:
            return Requirements()
        return Requirements(branch=Branch(inputs=self.second_view, pruning="independent"))

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        return scores + self.alpha * step.branch if self.alpha else scores

    def second_view(self, given: RawInputs) -> dict[str, Tensor]:
        """The entries of the inputs that differ in the branch."""
        pixels = given.tensors.get("pixel_values")
        if pixels is None or pixels.ndim != 4 or len(pixels) != len(given.seeds):
            found = "none" if pixels is None else f"pixel_values {list(pixels.shape)}"
            raise StackError(
                f"ritual: a second view is made of one picture a prompt, pixel_values [{len(given.seeds)}, colours,"
                f" height, width]; there are {found}"
            )
        return {"pixel_values": torch.stack([self._seen(*pair) for pair in zip(pixels, given.seeds, strict=True)])}

    def _seen(self, picture: Tensor, seed: int) -> Tensor:
        """The second view of one picture, [colours, height, width]."""
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + seed) % 2**63)
        kind, *amounts = torch.rand(4, generator=draw).tolist()
        view = VIEWS[int(kind * len(VIEWS))] if self.view == "random" else self.view
        if view == "contrast":
            return picture * (0.3 + 1.4 * amounts[0])
        grid = F.affine_grid(_placed(view, *amounts)[None], [1, *picture.shape], align_corners=False)
        seen = F.grid_sample(picture[None].float(), grid.to(picture.device), padding_mode="border", align_corners=False)
        return seen[0].to(picture.dtype)


def _placed(view: str, a: float, b: float, c: float) -> Tensor:
    """Where each point of the view lies in the picture, as a matrix [2, 3]; both run from -1 to 1. a, b, c: drawn from
    [0, 1).
    """
    if view == "crop":
        side = 0.5 + 0.4 * a
        return torch.tensor([[side, 0, (1 - side) * (2 * b - 1)], [0, side, (1 - side) * (2 * c - 1)]])
    if view == "turn":
        cos, sin = math.cos(2 * math.pi * a), math.sin(2 * math.pi * a)
        return torch.tensor([[cos, -sin, 0], [sin, cos, 0]])
    x, y = {"mirror": (-1.0, 1.0), "upside_down": (1.0, -1.0)}[view]
    return torch.tensor([[x, 0, 0], [0, y, 0]])
