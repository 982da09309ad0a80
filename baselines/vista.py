"""VISTA (ICML 2025): steer every MLP towards what the picture adds, and mix in the logits of late blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders import Decoder, Edits, ForwardView, RawInputs, Requirements, StackError, Step, hf
from decoders.options import check_number, is_integer

from .steering import turned


@dataclass
class VISTA(Decoder):
    """Steer MLP outputs towards what the image adds to the prompt, and mix in the logits of late blocks.

    Before the prefill the prompt runs twice, unedited: with its pictures and without them. The difference of the last
    token after block i is v_i [d], one an image. With hat(x) = x / |x|, the MLP of each block then returns, in place of
    y,

        hat(hat(y) + lam * (1 + max(0, cos(y, -v_i))) * hat(v_i)) * |y|

    at all tokens, those of the prompt included: an output that points against v_i gets up to twice the push. With W the
    output embeddings and h_i the newest token after block i, without the final norm, the scores s become

        (1 - alpha) * s + alpha * mean of W h_i over the blocks first <= i <= last.

    The Hidden Life of Tokens, https://arxiv.org/abs/2502.03628. Published for LLaVA-1.5 (32 blocks): lam 0.17 for
    CHAIR, 0.1 for MMHal, 0.01 for POPE; alpha 0.3 and blocks 25 to 30 in all. Other depths get the same shares.

    Otherwise than the official code: no 1 is added to the first coordinate of v_0 (which it does by a principal
    component of one sample), the model's type is kept, batches and beams work, and marks around the picture (start and
    end tokens of some families) stay in the prompt without it. Rows of branches are steered with the same v. An image
    costs two more prefills, of which one is text alone; a token costs no more forwards, and the output embeddings of
    last - first + 1 more states. Families that take no prompt without a picture (InstructBLIP) are refused, unless
    `lam` is 0.

    Args:
        lam: strength of the push, >= 0; 0 for none.
        alpha: weight of the late blocks, in [0, 1]; 0 for none.
        layers: [first, last], blocks counted from 0, both included; none for the published shares of the depth. The
            model's last block cannot be one of them.

    Raises:
        StackError: for a value out of range, or a block that the model does not have.
    """

    lam: float = 0.1
    alpha: float = 0.3
    layers: Sequence[int] | None = None

    def __post_init__(self):
        check_number(self, "lam", 0)
        check_number(self, "alpha", 0, 1)
        given = self.layers
        if given is not None and not (
            isinstance(given, Sequence)
            and len(given) == 2
            and all(map(is_integer, given))
            and 0 <= given[0] <= given[1]
        ):
            raise StackError(
                "vista: layers is none, or the first and the last of the late blocks, 0 <= first <= last, not"
                f" {given!r}"
            )

    def check_model(self, model: Any) -> None:
        if self.lam and (why := hf.needs_images(model)) is not None:
            raise StackError(f"vista: a prompt without its picture cannot run: {why}; lam=0 needs none")

    def requirements(self, model: Any) -> Requirements:
        steers = Requirements(edits=Edits(mlp=None) if self.lam else Edits(), constant_forward=bool(self.lam))
        if not self.alpha:
            return steers
        after = tuple(i + 1 for i in self.late(hf.num_layers(model)))
        return replace(steers, early_logits=after, early_norm=False)

    def late(self, count: int) -> range:
        """The late blocks of a model with `count`."""
        first, last = (round(25 / 32 * count), round(30 / 32 * count)) if self.layers is None else self.layers
        if count < 2 or (self.layers is not None and last > count - 2):
            raise StackError(
                f"vista: the late blocks are among the first {count - 1} of this model's {count}, counted from 0"
                + (f", not {first} to {last}" if self.layers is not None else "; alpha=0 leaves them out")
            )
        last = min(last, count - 2)
        return range(min(first, last), last + 1)

    def before_prefill(self, given: RawInputs) -> dict[str, Tensor]:
        """`added`, float32 [b, l, d]: v of every block."""
        text = given.last_hidden_states(given.without_images())
        return {"added": (given.last_hidden_states({}) - text)[:, 1:]}

    def edit_mlp(self, inputs: Tensor, output: Tensor, view: ForwardView) -> Tensor | None:
        added = view.image("added")
        assert added is not None  # from before_prefill
        v = added[:, view.layer, None].to(output.device)  # [m, 1, d]
        y = output.float()
        against = F.cosine_similarity(y, -v, dim=-1).clamp(min=0)[..., None]
        return turned(y, self.lam * (1 + against) * F.normalize(v, dim=-1))

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        if not self.alpha:
            return scores
        late = step.early_logits.mean(0)  # [n, v], of [blocks, n, v]
        return ((1 - self.alpha) * scores + self.alpha * late).masked_fill(scores == -torch.inf, -torch.inf)
