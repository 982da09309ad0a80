"""MemVR (ICML 2025): where a middle block is unsure of the next token, the next MLP looks at the picture once more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders import Decoder, Edits, ForwardView, Requirements, StackError, hf
from decoders.options import check_integer, check_number

_BEST = 10  # tokens over which a block is sure or not


@dataclass
class MemVR(Decoder):
    """Add the visual tokens to the output of a middle MLP once more when the next token is uncertain.

    With p the softmax of the 10 largest logits that the final norm and the output embeddings make of block i at the
    newest token, E_i = -sum p log p / log 10, in [0, 1]. In each forward the first block `start` < i < `end` with E_i
    > `threshold` makes the MLP of block i + 1 return, for its input x and in place of its own F, with the picture's
    tokens M [N, d] as keys and values,

        (1 - ratio) * F + ratio * (mean|F| / mean|R|) * R,     R = x M' M,

    at all tokens of that forward: of the prompt at all, by the E of its last one and with means over all of them; later
    at the newest.

    Look Twice Before You Answer, https://arxiv.org/abs/2410.03577. Published for LLaVA-1.5 (32 blocks): threshold 0.75,
    blocks 5 to 16; ratio 0.12 (MME, MM-Vet), 0.28 (VizWiz) and 0.32 (LLaVA-Bench); for CHAIR the script says 0.31, and
    the program that it calls fixes 0.12. Other depths get the same shares.

    Otherwise than the official code: E is a row's own, not a sum over the batch, and so are the means, over tokens that
    are no padding; M is what the embeddings of the prompt hold at visual tokens, of all pictures of a row, and is
    forgotten with the generation; beams and candidates are each looked at by themselves; no activation stands between
    the two products (SiLU does in the ports for Qwen-VL and GLM-4V, which as released do not look at all). What
    Qwen3-VL adds to visual tokens in later blocks is no part of M. E is of what the output embeddings make, without the
    factor that some families put on it.

    Costs no forward and no branch, but the output embeddings of one more state for each block between `start` and
    `end`, in every forward; what is computed does not depend on who is unsure. Rows of branches look at their own
    picture, and a branch without one never does.

    Args:
        ratio: share of the second look, in [0, 1]; 0 for none.
        threshold: how unsure a block must be, in [0, 1]; 1 is never exceeded.
        start: blocks after this one may be unsure, counted from 0; none for the published share of the depth.
        end: ... and before this one.

    Raises:
        StackError: for a value out of range, or a model without a block between these that another one follows.
    """

    ratio: float = 0.12
    threshold: float = 0.75
    start: int | None = None
    end: int | None = None

    def __post_init__(self):
        check_number(self, "ratio", 0, 1)
        check_number(self, "threshold", 0, 1)
        check_integer(self, "start", -1, optional=True)
        check_integer(self, "end", 0, optional=True)

    def requirements(self, model: Any) -> Requirements:
        if not self.ratio or self.threshold == 1:
            return Requirements()
        if hf.final_norm(model) is None or hf.output_embeddings(model) is None:
            raise StackError(
                f"memvr: {type(model).__name__} has no final norm or output embeddings where transformers puts them, so"
                " what its early blocks would say cannot be told"
            )
        after = tuple(i + 1 for i in self.blocks(hf.num_layers(model)))
        return Requirements(visual=True, edits=Edits(mlp=after, hidden=(0, *after)), constant_forward=True)

    def blocks(self, count: int) -> range:
        """The blocks that may be unsure, of a model with `count`."""
        start = round(5 / 32 * count) if self.start is None else self.start
        end = round(16 / 32 * count) if self.end is None else self.end
        found = range(start + 1, min(end, count - 1))
        if not found:
            raise StackError(
                f"memvr: no block of this model's {count} lies between start={start} and end={end} and has another one"
                " after it; blocks are counted from 0, and these two are not among them"
            )
        return found

    def edit_hidden_states(self, hidden: Tensor, view: ForwardView) -> None:
        if view.layer == 0:
            if view.in_prompt:  # zeros are neither keys nor values
                view.keep("memory", hidden.float() * view.visual_tokens[..., None])
            return
        unsure = entropy(_logits(view.model, view.newest(hidden))).to(hidden.device) > self.threshold
        before = view.scratch.get("looked", torch.zeros_like(unsure)).to(unsure.device)
        view.scratch["looks"], view.scratch["looked"] = unsure & ~before, unsure | before

    def edit_mlp(self, inputs: Tensor, output: Tensor, view: ForwardView) -> Tensor:
        memory = view.image("memory")
        assert memory is not None  # kept while the prompt ran
        memory, y = memory.to(output.device), output.float()
        again = inputs.float() @ memory.mT @ memory  # [m, q, d]
        size = _size(again, view)
        looks = view.scratch["looks"].to(size.device)[..., None] & (size > 0)  # [m, 1 or q, 1]
        mixed = (1 - self.ratio) * y + self.ratio * _size(y, view) / size * again
        return torch.where(looks, mixed, y)


def entropy(logits: Tensor) -> Tensor:
    """[...], that of the softmax of the largest of logits [..., v], as a share of the most that it can be."""
    best = logits.topk(_BEST, -1).values.softmax(-1)
    return torch.special.entr(best).sum(-1) / math.log(_BEST)


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """float32 [..., v]: what the model would say, were hidden states [..., d] those after its last block."""
    logits, cap = hf.output_embeddings(model)(hf.final_norm(model)(hidden)).float(), hf.logit_softcap(model)
    return logits if cap is None else cap * (logits / cap).tanh()


def _size(x: Tensor, view: ForwardView) -> Tensor:
    """The mean of |x|, x [m, q, d]: of each token, [m, q, 1]; in the prompt of all that are no padding, [m, 1, 1]."""
    each = x.abs().mean(-1, keepdim=True)
    if not view.in_prompt:
        return each
    real = view.real[..., None].to(each)
    return (each * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
