"""Hidden states that decoders read, and how the model makes logits of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import Tensor

from . import hf
from .attention import Tap
from .errors import StackError

LM_HEAD = -1  # where the output embeddings' own result stands among hidden states


@contextmanager
def capture_hidden_states(model, indices: set[int], tap: Tap) -> Iterator[dict[int, Tensor]]:
    """Within, forwards of this thread leave the hidden states `indices` in the dict yielded: [s, q, d], of the newest
    token alone while the prompt runs.
    """
    seen: dict[int, Tensor] = {}
    hooks, mine = [], get_ident()
    if indices:
        blocks, head = hf.blocks(model), hf.output_embeddings(model)
        if min(indices) < 0 or max(indices) > len(blocks):
            raise StackError(f"hidden states {sorted(indices)} were asked for; the model has 0 to {len(blocks)}")

    def newest(x: Tensor) -> Tensor:
        return x if tap.masks else x[:, -1:]

    def save_input(i: int):
        def save(module, args, kwargs):
            if get_ident() == mine:
                seen[i] = newest(hf.input_of(args, kwargs))

        return save

    def save_output(module, args, output):
        if get_ident() == mine:
            seen[LM_HEAD] = newest(output)

    try:
        for i in indices:
            module = blocks[i] if i < len(blocks) else head
            hooks.append(module.register_forward_pre_hook(save_input(i), with_kwargs=True))
        if indices:
            hooks.append(head.register_forward_hook(save_output))
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def infer_logit_transform(model, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes float32 logits of hidden states as the model does of its last: the output embeddings, and the scale or
    cap that it puts on their result.

    Args:
        raw: what the output embeddings made of some hidden states; `logits`: what the model made of that.
    """
    embeddings, raw, logits = hf.output_embeddings(model), raw.float(), logits.float()

    def same(ours: Tensor) -> bool:
        return bool((ours - logits).abs().max() <= 0.01 * logits.abs().max())

    scale = (raw * logits).sum() / (raw * raw).sum()
    cap = hf.logit_softcap(model)
    if cap and same(cap * (raw / cap).tanh()):  # before the others, which small logits fit as well
        return lambda hidden: cap * (embeddings(hidden).float() / cap).tanh()
    if same(raw):
        return lambda hidden: embeddings(hidden).float()
    if same(scale * raw):
        return lambda hidden: embeddings(hidden).float() * scale
    raise StackError(
        f"{type(model).__name__} makes its logits of its output embeddings in a way that is not known here (neither as"
        " they are, nor by a scale or final_logit_softcapping), so those of early layers cannot be made alike"
    )
