"""Hidden states that decoders read, and how the model makes logits of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from . import hf
from .attention import Tap, current_tap
from .errors import StackError

LM_HEAD = -1  # where the output embeddings' own result stands among hidden states


@contextmanager
def capture_hidden_states(model, indices: set[int]) -> Iterator[None]:
    """Within, forwards leave the hidden states `indices` in `Tap.hidden`, and make logits of those in `Tap.early`."""
    hooks: list = []
    if indices:
        blocks, head = hf.blocks(model), hf.output_embeddings(model)
        if min(indices) < 0 or max(indices) > len(blocks):
            raise StackError(f"hidden states {sorted(indices)} were asked for; the model has 0 to {len(blocks)}")
    try:
        for i in indices:
            module = blocks[i] if i < len(blocks) else head
            hooks.append(module.register_forward_pre_hook(_saving_input(i), with_kwargs=True))
        if indices:
            hooks.append(head.register_forward_pre_hook(_join_early, with_kwargs=True))
            hooks.append(head.register_forward_hook(_save_output))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _own_tap() -> Tap | None:
    """The tap of the loop whose model runs; None in a forward of another thread, and in a call of a decoder's hook."""
    tap = current_tap()
    return None if tap is None or (tap.inside is not None and tap.inside.in_hook) else tap


def _save(index: int, x: Tensor) -> None:
    tap = _own_tap()
    if tap is not None:
        tap.hidden[index] = x if tap.masks else x[:, -1:]


def _saving_input(index: int) -> Callable:
    def save(module, args, kwargs):
        _save(index, hf.input_of(args, kwargs))

    return save


def _join_early(module, args, kwargs):
    tap = _own_tap()
    if tap is None or tap.early is None:
        return None
    return hf.with_input(args, kwargs, tap.early.join(hf.input_of(args, kwargs), tap.hidden))


def _save_output(module, args, output):
    _save(LM_HEAD, output)


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
