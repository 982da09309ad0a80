"""The two ends of a generation: the cache is filled with the prompt, or with what another generation left, and left to
the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import hf
from .cache_layers import LeftCache, PoolLayer, StateLayer, WindowLayer, make_cache
from .errors import StackError
from .kv_pool import SlotTable
from .mirror import Mirror
from .outputs import ForwardOutput
from .runner import ModelRunner
from .tensors import left_pad, pad_slots, rows_first


def prefill(runner: ModelRunner, visual: Tensor | None) -> ForwardOutput:
    """Run the prompts, each image's once; `visual`, bool [s, prompt], is true at visual tokens, if anybody asks."""
    runner.padding, runner.visual = _padding(runner), visual
    runner.mirror = Mirror(runner.padding, visual, len(runner.inputs.input_ids))
    if isinstance(left := hf.cache_of(runner.inputs.kwargs), LeftCache) and runner.pooled:
        return _resume(runner, left, visual)
    seen, caches, ends = [], [], []
    for i, one in enumerate((runner.inputs, *runner.branches)):
        cache = runner.cache if i == 0 else make_cache(runner.cache)
        with _inside_prompt(runner, i, one.prompt):
            out, end = hf.prefill(runner.model, one.input_ids, one.config, hf.with_cache(one.kwargs, cache))
            runner.tap.collect()
        seen.append(runner.output_of(out, out.logits[:, -1:]).map(lambda x: x[:, -1]))
        caches.append(cache)
        ends.append(end)
    runner.constant = hf.constant_inputs(ends[0])
    newest = [hf.token_inputs(end) for end in ends]
    # of the first answer token; [s, 1] or [axes, s, 1]
    runner.newest = {k: torch.cat([one[k] for one in newest], -2) for k in newest[0]}
    if runner.pooled and "position_ids" not in runner.newest:
        raise StackError(
            f"{type(runner.model).__name__} takes no position_ids, without which a changed cache would shift its"
            " positions"
        )
    tokens = runner.inputs.input_ids.new_zeros(len(runner.inputs.input_ids), 1)
    probe = {**runner.constant, **hf.token_inputs(ends[0])}
    runner.takes_positions = "position_ids" in hf.decode_inputs(runner.model, tokens, runner.cache, None, probe)
    runner.a_row_a_sequence |= not runner.takes_positions  # by its length, the positions of one token follow
    _make_tables(runner, caches, visual)
    _drop_hidden(runner)
    return ForwardOutput(
        torch.cat([s.logits for s in seen]),
        {k: torch.cat([s.queries[k] for s in seen]) for k in seen[0].queries},
        rows_first(runner.mask_of(runner.slots, runner.slots.visible)) if seen[0].queries else None,
        _of_all(seen),
        {k: torch.cat([left_pad(s.rows[k], runner.prompt) for s in seen]) for k in seen[0].rows},
        output=seen[0].output,
    )


@contextmanager
def _inside_prompt(runner: ModelRunner, branch: int, length: int) -> Iterator[None]:
    """Within, decoders' hooks inside the forward see the prompts, of so many slots, of the main rows or a branch."""
    inside = runner.tap.inside
    if inside is None:
        yield
        return
    b = len(runner.inputs.input_ids)
    mine, offset = slice(branch * b, (branch + 1) * b), runner.prompt - length
    visual = None if runner.visual is None else runner.visual[mine, offset:]
    real = runner.padding[mine, offset:].bool()
    inside.begin((branch,), True, None if visual is None else visual[None], real, visual)
    try:
        runner.tap.clear()
        yield
    finally:
        inside.end()


def _of_all(seen: list[ForwardOutput]) -> dict[Any, Tensor]:
    """Hidden states and what was exported, of the main rows and of branches; zeros for what these did not export."""
    return {
        k: torch.cat([s.hidden[k] if k in s.hidden else torch.zeros_like(seen[0].hidden[k]) for s in seen])
        for k in seen[0].hidden
    }


def _padding(runner: ModelRunner) -> Tensor:
    """[s, prompt], 0 where no token is."""
    masks = []
    for one in (runner.inputs, *runner.branches):
        mask = one.kwargs.get("attention_mask")
        mask = torch.ones(len(one.input_ids), one.prompt, device=one.input_ids.device) if mask is None else mask
        masks.append(left_pad(mask, runner.prompt))
    return torch.cat(masks).to(runner.inputs.input_ids.device)


def _resume(runner: ModelRunner, left: LeftCache, visual: Tensor | None) -> ForwardOutput:
    """Run what a conversation has grown by since `left`, which another generation left."""
    new = runner.prompt - left.length
    tokens = runner.inputs.input_ids[:, left.length :]
    at = torch.arange(-new, 0, device=tokens.device).expand(len(tokens), -1)
    runner.constant = hf.constant_inputs(runner.inputs.kwargs)
    runner.newest = {k: v + new if k == "position_ids" else v for k, v in left.token_inputs.items()}
    runner.takes_positions = True
    real = runner.padding.bool()
    visible = []
    for indices, position in left.positions:
        layers = [layer for i in indices if isinstance(layer := runner.cache.layers[i], PoolLayer)]
        window = hf.layer_window(layers[0])
        table = SlotTable.resume(indices, layers, (left, position), (real, visual), window)
        runner.tables.append(table)
        own = table.write(at + runner.prompt)  # [q, capacity]
        own = own & real[:, left.length :, None]  # of tokens that are there, [s, q, capacity]
        visible.append(table.visible | own.cumsum(1).bool())
        table.visible = visible[-1][:, :, -1:]
    return runner.attend(tokens, at, at + runner.prompt, visible, prompt=True).map(lambda x: x[:, -1])


def _make_tables(runner: ModelRunner, caches: list[hf.Cache], visual: Tensor | None) -> None:
    if not runner.pooled:
        return
    for i, layer in enumerate(runner.cache.layers):
        if isinstance(layer, PoolLayer) and layer.used != runner.inputs.prompt:
            raise StackError(
                f"{type(runner.model).__name__}: layer {i} caches {layer.used or 'no'} slots for a prompt of"
                f" {runner.inputs.prompt} tokens (cross-attention, or keys and values of another layer), which a"
                " stack with decoders does not support"
            )
        if len(caches) > 1 and isinstance(layer, (PoolLayer, StateLayer)):
            others: list = [cache.layers[i] for cache in caches[1:]]
            layer.join(others, runner.prompt)
    windowed = [i for i, layer in enumerate(runner.cache.layers) if isinstance(layer, WindowLayer)]
    for indices in (list(runner.layers), [i for i in windowed if i not in runner.layers]):
        layers = [layer for i in indices if isinstance(layer := runner.cache.layers[i], PoolLayer)]
        if layers:
            runner.tables.append(SlotTable.of(indices, layers, runner.padding, visual, hf.layer_window(layers[0])))
    runner.recurrent = [layer for layer in runner.cache.layers if isinstance(layer, StateLayer)]


def _drop_hidden(runner: ModelRunner) -> None:
    """Layers see no more what decoders hid from them for good while the prompts ran."""
    inside, b = runner.tap.inside, len(runner.inputs.input_ids)
    if inside is None or not inside.dropped:
        return
    visible = runner.slots.visible[:, :, 0]
    keep = torch.ones_like(visible).expand(len(runner.layers), -1, -1).clone()
    for branch, layer, slots in inside.dropped:
        at = pad_slots(left_pad(slots.to(keep.device), runner.prompt), keep.shape[-1])
        keep[layer + 1 :, branch * b : (branch + 1) * b] &= ~at
    runner.slots.keep(keep)


def leave_cache(
    runner: ModelRunner, ids: Tensor, lengths: list[int], rows: int | None, whole: bool, unknown: str | None
) -> hf.Cache:
    """The cache that `generate` returns, with what each row returned saw.

    Args:
        ids: long [n, sequence], what is returned; `lengths`: of each.
        rows: beams of an image that are returned, under beam search.
        whole: whether nothing can have been dropped.
        unknown: why it cannot be continued, or None.
    """
    if not runner.pooled:
        return runner.cache
    if runner.a_row_a_sequence and rows is not None:
        rows, unknown = None, "each beam had a cache of its own"
    rows = runner.k if rows is None else rows
    length, count = max(min(lengths) - 1, 0), runner.sequences // runner.ways
    offset = runner.prompt - runner.inputs.prompt
    if runner.inputs.prompt != runner.inputs.input_ids.shape[1]:
        unknown = "the prompt was given as inputs_embeds"
        length += runner.inputs.prompt - runner.inputs.input_ids.shape[1]
    if runner.recurrent:
        unknown = "layers keep running states"
    left: dict[int, Any] = {}
    positions = []
    for table in runner.tables:
        mine, position = table.leave(count, rows, length, offset, whole)
        left |= mine
        positions.append((table.indices, position))
    after = length - runner.inputs.prompt
    token_inputs = {}
    for name, value in runner.newest.items():
        own = value.narrow(-2, 0, count).repeat_interleave(rows, -2)
        token_inputs[name] = own + after if name == "position_ids" else own
    layers = [left.get(i, layer) for i, layer in enumerate(runner.cache.layers)]
    return LeftCache(layers, ids[:, :length], positions, token_inputs, unknown)
