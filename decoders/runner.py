"""Runs the model: the prompts once, then tokens and candidates of all rows, main ones and branches, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .attention import Tap
from .errors import StackError
from .kv_pool import PoolLayer, SlotMove, SlotTable, StateLayer, WindowLayer, make_cache, pad_slots
from .prepare import Prepared
from .state import left_pad


@dataclass
class ForwardOutput:
    """What a forward showed at the newest tokens. [m, ...] for one token a row, [m, c, ...] for c candidates each.

    Attributes:
        logits: [m, v].
        attention: float32 [m, t] by (layer, way to join heads); layers are counted among those that attend to the whole
            sequence.
        hidden: [m, d] by index of the hidden state.
        output: what the model returned.
        parts: what was made of it for the decoders.
    """

    logits: Tensor
    attention: dict[tuple[int, str], Tensor]
    hidden: dict[int, Tensor]
    output: Any = None
    parts: dict[tuple, Tensor] = field(default_factory=dict)

    def part(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """What decoders read of it, made once."""
        if key not in self.parts:
            self.parts[key] = make()
        return self.parts[key]

    def map(self, change: Callable[[Tensor], Tensor]) -> ForwardOutput:
        """With every tensor changed."""
        return ForwardOutput(
            change(self.logits),
            {k: change(v) for k, v in self.attention.items()},
            {k: change(v) for k, v in self.hidden.items()},
            self.output,
        )


_LM_HEAD = -1  # where the output embeddings' own result stands among hidden states


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
            seen[_LM_HEAD] = newest(output)

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


def _lm_head(model, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
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


@dataclass
class CandidateRun:
    """What running c candidates of each row showed, before one is picked.

    Attributes:
        output: [m, c, ...].
        own: bool [k, c, capacity] by table, the slot of each candidate.
        length: written slots before the candidates'.
    """

    output: ForwardOutput
    own: list[Tensor]
    length: int

    def attention(self, layer: int, heads: str, n: int) -> Tensor:
        """Rows of the first n rows' candidates, float32 [n, c, length + 1]: what was there, and each itself."""
        rows = self.output.attention[layer, heads][:n]
        own = self.own[0]  # [k, c, t]
        itself = rows.masked_fill(~own.repeat(n // len(own), 1, 1).to(rows.device), 0).sum(-1, keepdim=True)
        return torch.cat([rows[..., : self.length], itself], -1)


class ModelRunner:
    """Rows of the model: n main rows, then n of each branch; m in all. They are k rows each of s sequences.

    Args:
        inputs: what is prefilled, a row an image.
        branches: the same for each branch.
        tap: what attention reads, and what is read of it.
        hidden: where hidden states arrive.
        pooled: whether the loop's own cache stands in for the one that transformers prepared.
        layers: indices of the layers that attend to the whole sequence.
        a_row_a_sequence: whether each beam needs a sequence for itself: running states belong to one, and so do the
            attentions that `generate` returns.
    """

    def __init__(
        self,
        inputs: Prepared,
        branches: list[Prepared],
        tap: Tap,
        hidden: dict[int, Tensor],
        pooled: bool,
        layers: tuple[int, ...],
        a_row_a_sequence: bool,
    ):
        self.model, self.tap, self.hidden = inputs.model, tap, hidden
        self.inputs, self.branches, self.pooled, self.layers = inputs, branches, pooled, layers
        self.a_row_a_sequence = a_row_a_sequence
        self.ways = len(branches) + 1
        self.k, self.sequences = 1, len(inputs.input_ids) * self.ways
        self.head: Callable[[Tensor], Tensor] | None = None  # where somebody reads hidden states
        self.prompt = max(p.prompt for p in (inputs, *branches))
        cache = hf.cache_of(inputs.kwargs)
        if cache is None:
            raise StackError(
                f"{type(self.model).__name__} keeps no cache of keys and values (as Mamba and RWKV), and this loop"
                " decodes models that do"
            )
        self.cache = make_cache(cache) if pooled else cache
        self.tables: list[SlotTable] = []
        self.recurrent: list[StateLayer] = []

    @property
    def rows(self) -> int:
        """n, main rows."""
        return self.sequences * self.k // self.ways

    @property
    def slots(self) -> SlotTable:
        """Of the layers that attend to the whole sequence, which decoders see."""
        return self.tables[0]

    # the prompt

    def prefill(self) -> ForwardOutput:
        """Run the prompts, each image's once."""
        seen, caches, ends = [], [], []
        for i, one in enumerate((self.inputs, *self.branches)):
            cache = self.cache if i == 0 else make_cache(self.cache)
            out, end = hf.prefill(self.model, one.input_ids, one.config, hf.with_cache(one.kwargs, cache))
            seen.append(self._output(out, out.logits[:, -1:]).map(lambda x: x[:, -1]))
            caches.append(cache)
            ends.append(end)
        self.constant = hf.constant_inputs(ends[0])
        newest = [hf.token_inputs(end) for end in ends]
        # of the first answer token; [s, 1] or [axes, s, 1]
        self.newest = {k: torch.cat([one[k] for one in newest], -2) for k in newest[0]}
        if self.pooled and "position_ids" not in self.newest:
            raise StackError(
                f"{type(self.model).__name__} takes no position_ids, without which a changed cache would shift its"
                " positions"
            )
        tokens = self.inputs.input_ids.new_zeros(len(self.inputs.input_ids), 1)
        probe = {**self.constant, **hf.token_inputs(ends[0])}
        self.takes_positions = "position_ids" in hf.decode_inputs(self.model, tokens, self.cache, None, probe)
        self.a_row_a_sequence |= not self.takes_positions  # by its length, the positions of one token follow
        self._make_tables(caches)
        return ForwardOutput(
            torch.cat([s.logits for s in seen]),
            {k: torch.cat([left_pad(s.attention[k], self.prompt) for s in seen]) for k in seen[0].attention},
            {k: torch.cat([s.hidden[k] for s in seen]) for k in seen[0].hidden},
            seen[0].output,
        )

    def _make_tables(self, caches: list[hf.Cache]) -> None:
        masks = []
        for one in (self.inputs, *self.branches):
            mask = one.kwargs.get("attention_mask")
            mask = torch.ones(len(one.input_ids), one.prompt, device=one.input_ids.device) if mask is None else mask
            masks.append(left_pad(mask, self.prompt))
        self.padding = torch.cat(masks).to(self.inputs.input_ids.device)
        if not self.pooled:
            return
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, PoolLayer) and layer.used != self.inputs.prompt:
                raise StackError(
                    f"{type(self.model).__name__}: layer {i} caches {layer.used or 'no'} slots for a prompt of"
                    f" {self.inputs.prompt} tokens (cross-attention, or keys and values of another layer), which a"
                    " stack with decoders does not support"
                )
            if len(caches) > 1 and isinstance(layer, (PoolLayer, StateLayer)):
                others: list = [cache.layers[i] for cache in caches[1:]]
                layer.join(others, self.prompt)
        windowed = [i for i, layer in enumerate(self.cache.layers) if isinstance(layer, WindowLayer)]
        for indices in (list(self.layers), [i for i in windowed if i not in self.layers]):
            layers = [layer for i in indices if isinstance(layer := self.cache.layers[i], PoolLayer)]
            if layers:
                self.tables.append(SlotTable.of(indices, layers, self.padding, hf.layer_window(layers[0])))
        self.recurrent = [layer for layer in self.cache.layers if isinstance(layer, StateLayer)]

    def last_prompt_tokens(self) -> Tensor:
        """[m]"""
        return torch.cat(
            [
                one.input_ids[:, -1] if one.input_ids.shape[1] else one.input_ids.new_zeros(len(one.input_ids))
                for one in (self.inputs, *self.branches)
            ]
        )

    def expand(self, k: int) -> None:
        """Make k rows of each image: beams, or answers."""
        if not self.pooled or k == 1:
            return
        if not self.a_row_a_sequence:
            for table in self.tables:
                table.expand(k)
            self.k = k
            return
        index = torch.arange(self.sequences, device=self.padding.device).repeat_interleave(k)
        self.sequences *= k
        self._select(index)
        self.newest = {name: value.index_select(-2, index) for name, value in self.newest.items()}

    def _select(self, sequences: Tensor) -> None:
        for table in self.tables:
            table.select(sequences)
        for layer in self.recurrent:
            hf.reorder(layer, sequences)

    def to_all_branches(self, rows: Tensor, count: int) -> Tensor:
        """The same choice among the `count` rows of every branch: [m] from [n]."""
        return torch.cat([rows + i * count for i in range(self.ways)])

    # steps

    def make_room(self, queries: int, seen: list[list[Tensor]]) -> SlotMove | None:
        """Before a step that may write `queries` slots a row: drop what nobody sees where there is no room.

        Args:
            seen: what checkpoints keep, tensors like `SlotTable.visible`, by table; they are replaced.

        Returns:
            Where the slots that decoders see have moved to, or None.
        """
        moves: list[SlotMove | None] = []
        for i, table in enumerate(self.tables):
            move = None
            if table.used + queries * self.k > table.capacity or table.wasteful:
                move = table.make_room(queries * self.k, [one[i] for one in seen])
                table.wasteful = False
            if move is not None:
                for one in seen:
                    one[i] = move(one[i])
            moves.append(move)
        return moves[0] if moves else None

    def decode_step(self, tokens: Tensor, at: Tensor) -> ForwardOutput:
        """Run one token a row, long [n] or [m], which is token `at` of the answer, long [n]."""
        tokens = tokens if len(tokens) == self.sequences * self.k else tokens.repeat(self.ways)
        at = at.repeat(self.ways)
        if not self.pooled:
            length = self.cache.get_seq_length() + 1
            mask = torch.cat([self.padding, self.padding.new_ones(len(at), length - self.padding.shape[1])], -1)
            return self._forward(tokens[:, None], at[:, None], mask).map(lambda x: x[:, -1])
        tokens, at = tokens.view(-1, self.k), at.view(-1, self.k)
        visible = []
        for table in self.tables:
            own = table.write(at + self.prompt)
            table.visible = table.visible | own
            visible.append(table.visible)
        return self._attend(tokens, at, visible).map(lambda x: x.flatten(0, 1))

    def forward_candidates(self, tokens: Tensor, at: Tensor) -> CandidateRun:
        """Run the candidates `tokens`, long [n, c], of each row, each alone after what the row sees, all as token `at`,
        long [n].
        """
        c, length = tokens.shape[1], self.slots.used
        tokens = tokens.repeat(self.ways, 1).view(-1, self.k * c)  # [s, k * c]
        at = at.repeat(self.ways).view(-1, self.k).repeat_interleave(c, 1)
        visible, every = [], []
        for table in self.tables:
            own = table.write(at + self.prompt)
            every.append(rearrange(own, "(k c) t -> k c t", c=c))
            visible.append(table.visible.repeat_interleave(c, 2) | own)
        out = self._attend(tokens, at, visible, c).map(lambda x: rearrange(x, "s (k c) ... -> (s k) c ...", c=c))
        return CandidateRun(out, every, length)

    def commit_candidates(self, run: CandidateRun, parents: Tensor, choice: Tensor) -> ForwardOutput:
        """Row i becomes row `parents[i]` and its candidate `choice[i]`, long [n]."""
        rows = self.to_all_branches(parents, self.rows)
        choice = choice.repeat(self.ways)
        k = rows.view(-1, self.k) % self.k
        for table, own in zip(self.tables, run.own, strict=True):
            table.reorder(k)
            table.visible = table.visible | own[k, choice.view(-1, self.k)]
        return replace(run.output.map(lambda x: x[rows, choice]), output=None)

    def rerun(self, tokens: Tensor, at: Tensor) -> ForwardOutput:
        """Run the newest token of each row, long [n] or [m], again, which is the answer's token `at`, [n], -1 for the
        prompt's last. What it wrote before is seen no more.
        """
        if self.recurrent:  # a decoder that prunes before the first token and does not say so
            raise StackError(
                f"{type(self.model).__name__} keeps running states, which cannot be taken back; a decoder that prunes"
                " before the first token declares Reads(again=True)"
            )
        position = (at.repeat(self.ways) + self.prompt).view(1, -1, self.k, 1)
        for table in self.tables:
            table.visible = table.visible & (table.position[:, :, None] != position)
        return self.decode_step(tokens, at)

    def reorder(self, parents: Tensor) -> None:
        """Row i becomes row `parents[i]`, long [n], of the same image."""
        rows = self.to_all_branches(parents, self.rows if self.pooled else len(parents))
        if not self.pooled:
            hf.reorder(self.cache, rows)
            self.padding = self.padding[rows]
        elif self.a_row_a_sequence:
            self._select(rows)
        else:
            for table in self.tables:
                table.reorder(rows.view(-1, self.k) % self.k)

    def add_bias(self, parts: list[Tensor | None]) -> None:
        """Add to the attention scores of forwards from now on: a float [l or 1, n, t] for the main rows and each
        branch, None for nothing.
        """
        known = [p for p in parts if p is not None]
        self.bias = None
        if known:
            count = max(len(p) for p in known)
            none = known[0].new_zeros(known[0].shape)
            bias = torch.cat([(none if p is None else p).expand(count, -1, -1) for p in parts], 1)
            self.bias = rearrange(bias, "l (s k) t -> l s k t", k=self.k)

    bias: Tensor | None = None

    def _attend(self, tokens: Tensor, at: Tensor, visible: list[Tensor], c: int = 1) -> ForwardOutput:
        """A forward of the tokens [s, q], each of which sees `visible`, bool [L or 1, s, q, capacity] by table."""
        position = at + self.prompt
        masks: dict[int, Tensor] = {}
        for table, seen in zip(self.tables, visible, strict=True):
            sees = table.mask(seen, position)
            dtype = table.layers[0].keys.dtype
            if table is self.slots and self.bias is not None:
                bias = pad_slots(self.bias, sees.shape[-1]).repeat_interleave(c, 2)[:, :, None].to(dtype)
            else:
                bias = torch.zeros((), dtype=dtype, device=sees.device)
            # added to the scores, as kernels want it: a boolean mask would be turned into this in every layer
            mask = bias.masked_fill(~sees, -torch.inf)
            masks |= {i: mask[j if len(mask) > 1 else 0] for j, i in enumerate(table.indices)}
        self.tap.masks = masks
        try:
            return self._forward(tokens, at, masks[self.layers[0]])
        finally:
            self.tap.masks = {}

    def _forward(self, tokens: Tensor, at: Tensor, mask: Tensor | None) -> ForwardOutput:
        """Run the tokens [s, q], token `at`, [s, q], of the answer."""
        kwargs = dict(self.constant)
        for name, value in self.newest.items():
            kwargs[name] = value + at if name == "position_ids" else value.expand(*value.shape[:-1], at.shape[1])
        # attention takes the tap's masks; what the model is given only must not make it make others
        ready = not self.pooled or (not self.recurrent and hf.takes_ready_masks(self.model))
        inputs = hf.decode_inputs(self.model, tokens, self.cache, mask if ready else None, kwargs)
        out = self.model(**inputs, return_dict=True)
        return self._output(out, out.logits[:, -tokens.shape[1] :])

    def _output(self, out, logits: Tensor) -> ForwardOutput:
        rows, self.tap.rows = self.tap.rows, {}
        hidden = dict(self.hidden)
        self.hidden.clear()
        raw = hidden.pop(_LM_HEAD, None)
        if raw is not None and self.head is None:
            self.head = _lm_head(self.model, raw, logits)
        device = self.inputs.input_ids.device
        attention = {(self.layers.index(layer), heads): row for (layer, heads), row in rows.items()}
        return replace(ForwardOutput(logits, attention, hidden).map(lambda x: x.to(device)), output=out)

    def leave_cache(self, sealed: bool) -> hf.Cache:
        """The cache that `generate` returns: a row for each main row, with what it saw at its end. One that is `sealed`
        cannot be continued.
        """
        if not self.pooled:
            return self.cache
        left: dict[int, Any] = {}
        for table in self.tables:
            left |= table.leave(self.sequences // self.ways, sealed)
        return hf.Cache(layers=[left.get(i, layer) for i, layer in enumerate(self.cache.layers)])

    # going back

    def save(self) -> list[Tensor]:
        """What `restore` needs: what each row sees, by table."""
        return [table.visible for table in self.tables]

    def restore(self, saved: list[list[Tensor]], size: int) -> None:
        """Rows of group g, `size` rows, see what they saw in `saved[g]`."""
        for i, table in enumerate(self.tables):
            rows = []
            for visible in (pad_slots(one[i], table.capacity) for one in saved):
                rows.append(rearrange(visible, "l (w b) k t -> l w (b k) t", w=self.ways))
            layers = max(map(len, rows))
            mine = [x.expand(layers, -1, -1, -1)[:, :, g * size : (g + 1) * size] for g, x in enumerate(rows)]
            table.visible = rearrange(torch.cat(mine, 2), "l w (b k) t -> l (w b) k t", k=self.k)
