"""Runs the model: the prompts once, then tokens and candidates of all rows, main ones and branches, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .attention import Tap
from .attention import rows as attention_rows
from .cache_layers import LeftCache, StateLayer, make_cache
from .capture import LM_HEAD, infer_logit_transform
from .captured import CapturedStep
from .compiled import CompiledStep
from .early import EarlyLogits
from .errors import StackError
from .inputs import PreparedInputs
from .kv_pool import SavedSlots, SlotTable
from .mirror import Mirror
from .outputs import CandidateRun, ForwardOutput
from .tensors import entries, pad_slots, rows_first


class ModelRunner:
    """Rows of the model: n main rows, then n of each branch; m in all. They are k rows each of s sequences.

    Args:
        inputs: what is prefilled, a row an image.
        branches: the same for each branch.
        tap: what attention is given, and what is kept of it and of hidden states.
        pooled: whether the loop's own cache stands in for the one that transformers prepared.
        layers: indices of the layers that attend to the whole sequence.
        a_row_a_sequence: whether each beam needs a sequence for itself: running states belong to one, and so do the
            attentions that `generate` returns.
    """

    def __init__(
        self,
        inputs: PreparedInputs,
        branches: list[PreparedInputs],
        tap: Tap,
        pooled: bool,
        layers: tuple[int, ...],
        a_row_a_sequence: bool,
    ):
        self.model, self.tap = inputs.model, tap
        self.inputs, self.branches, self.pooled, self.layers = inputs, branches, pooled, layers
        self.a_row_a_sequence = a_row_a_sequence
        self.ways = len(branches) + 1
        self.k, self.sequences = 1, len(inputs.input_ids) * self.ways
        self.to_logits: Callable[[Tensor], Tensor] | None = None  # where somebody reads hidden states
        self.prompt = max(p.prompt for p in (inputs, *branches))
        cache = hf.cache_of(inputs.kwargs)
        if cache is None or not hf.keeps_keys(cache):
            raise StackError(
                f"{type(self.model).__name__} keeps no cache of keys and values (as Mamba and RWKV), and this loop"
                " decodes models that do"
            )
        template = hf.empty_cache(self.model) if isinstance(cache, LeftCache) else cache
        self.cache = make_cache(template) if pooled else cache
        self.compiled: CompiledStep | CapturedStep | None = None  # what runs decode steps, where they are graphs
        self.masks_by_layer = False  # even where all layers see the same, so that shapes stay the same when some prune
        self.read: tuple[int, ...] = ()  # hidden states that are read
        self.early: EarlyLogits | None = None  # early layers whose logits are read
        self.bias: Tensor | None = None  # added to attention scores, [l or 1, s, k, t]
        self._scalars: dict[torch.dtype, tuple[Tensor, ...]] = {}
        # what running the prompt shows (`prompts.py`)
        self.constant: dict = {}  # inputs of the model that are the same at every step
        self.newest: dict[str, Tensor] = {}  # those of the first answer token, [s, 1] or [axes, s, 1]
        self.padding = inputs.input_ids  # [s, prompt], 0 where no token is
        self.visual: Tensor | None = None  # bool [s, prompt], true at visual tokens, if anybody asks
        self.mirror = Mirror(self.padding, None, len(inputs.input_ids))
        self.takes_positions = True
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

    def last_prompt_tokens(self) -> Tensor:
        """[m]"""
        return torch.cat(
            [
                one.input_ids[:, -1] if one.input_ids.shape[1] else one.input_ids.new_zeros(len(one.input_ids))
                for one in (self.inputs, *self.branches)
            ]
        )

    def rerun_last_prompt_token(self) -> ForwardOutput:
        """Run the last token of each prompt again, against what rows see now."""
        index = torch.full((self.rows,), -1, device=self.padding.device)
        if self.tap.inside is not None:
            self.tap.inside.is_rerun = True  # until this forward ends
        return replace(self.rerun(self.last_prompt_tokens(), index), is_rerun=True)

    def expand(self, output: ForwardOutput, k: int) -> ForwardOutput:
        """Make k rows of each image: beams, or answers; `output` is what its one row showed."""
        if k == 1:
            return output
        if not self.a_row_a_sequence:
            for table in self.tables:
                table.expand(k)
            self.k = k
        else:
            index = torch.arange(self.sequences, device=self.padding.device).repeat_interleave(k)
            self.sequences *= k
            self._select(index)
            self.newest = {name: value.index_select(-2, index) for name, value in self.newest.items()}
        return output.map(lambda x: x.repeat_interleave(k, 0))

    def _select(self, sequences: Tensor) -> None:
        for table in self.tables:
            table.select(sequences)
        for layer in self.recurrent:
            hf.reorder(layer, sequences)

    def to_all_branches(self, rows: Tensor, count: int) -> Tensor:
        """The same choice among the `count` rows of every branch: [m] from [n]."""
        return torch.cat([rows + i * count for i in range(self.ways)])

    def save_slots(self) -> list[SavedSlots]:
        """What each row sees, by table: what `rollback.py` needs."""
        return [SavedSlots(table.visible, table.finished) for table in self.tables]

    # steps

    def make_room(
        self, output: ForwardOutput, candidates: int, saved: Callable[[int], list[SavedSlots]] | None = None
    ) -> ForwardOutput:
        """Before a step that may run so many candidates a row: drop what nobody sees where there is no room.

        Args:
            output: of the newest forward, whose mask moves with the slots.
            saved: what checkpoints remember of a table, by its index; they move too.
        """
        # a token a row where none of the candidates is picked, and one to run the newest again
        more = 2 * self.k
        for i, table in enumerate(self.tables):
            if table.used + table.fresh(candidates * self.k) + more <= table.capacity and not table.wasteful:
                continue
            move = table.make_room(candidates * self.k + more, saved(i) if saved else [])
            table.wasteful = False
            if move is not None and table is self.slots:
                output = output.move_slots(move)
        return output

    def decode_step(self, tokens: Tensor, at: Tensor) -> ForwardOutput:
        """Run one token a row, long [n] or [m], which is token `at` of the answer, long [n]."""
        tokens = tokens if len(tokens) == self.sequences * self.k else tokens.repeat(self.ways)
        at = at if self.ways == 1 else at.repeat(self.ways)
        if not self.pooled:
            length = self.cache.get_seq_length() + 1
            mask = torch.cat([self.padding, self.padding.new_ones(len(at), length - self.padding.shape[1])], -1)
            return self._forward(tokens[:, None], at[:, None], mask).map(lambda x: x[:, -1])
        tokens, at, self.tap.early = tokens.view(-1, self.k), at.view(-1, self.k), self.early
        visible, position = [], at + self.prompt
        for table in self.tables:
            own = table.write(position, self.compiled is not None)
            table.visible = table.visible | own
            visible.append(table.visible)
        return self.attend(tokens, at, position, visible).map(lambda x: x.flatten(0, 1))

    def forward_candidates(self, tokens: Tensor, at: Tensor) -> CandidateRun:
        """Run the candidates `tokens`, long [n, c], of each row, each alone after what the row sees, all as token `at`,
        long [n].
        """
        c, length, given = tokens.shape[1], self.slots.used, tokens
        tokens = tokens.repeat(self.ways, 1).view(-1, self.k * c)  # [s, k * c]
        at = at.repeat(self.ways).view(-1, self.k).repeat_interleave(c, 1)
        visible, every, position = [], [], at + self.prompt
        for table in self.tables:
            slots = table.write_candidates(position)
            own = table.slot_numbers() == slots[..., None]
            every.append(rearrange(own, "s (k c) t -> s k c t", c=c))
            visible.append(table.visible.repeat_interleave(c, 2) | own)
        out = self.attend(tokens, at, position, visible, c).map(
            lambda x: rearrange(x, "s (k c) ... -> (s k) c ...", c=c)
        )
        return CandidateRun(given, out, every, length)

    def commit_candidates(self, run: CandidateRun, parents: Tensor, choice: Tensor) -> ForwardOutput:
        """Row i becomes row `parents[i]` and its candidate `choice[i]`, long [n]."""
        rows = self.to_all_branches(parents, self.rows)
        choice = choice.repeat(self.ways)
        k = rows.view(-1, self.k) % self.k
        choices = choice.view(-1, self.k)
        s = torch.arange(len(k), device=k.device)[:, None]
        for table, own in zip(self.tables, run.own, strict=True):
            table.reorder(k)
            table.visible = table.visible | own[s, k, choices]
            table.release(k * run.tokens.shape[1] + choices)
        return replace(run.output.map(lambda x: x[rows, choice]), output=None)

    def rerun(self, tokens: Tensor, at: Tensor) -> ForwardOutput:
        """Run the newest token of each row, long [n] or [m], again, which is the answer's token `at`, [n], -1 for the
        prompt's last. What it wrote before is seen no more.
        """
        if self.recurrent:  # a decoder that prunes before the first token and does not say so
            raise StackError(
                f"{type(self.model).__name__} keeps running states, which cannot be taken back; a decoder that prunes"
                " before the first token declares Requirements(reruns_last_token=True)"
            )
        position = (at.repeat(self.ways) + self.prompt).view(1, -1, self.k, 1)
        for table in self.tables:
            table.visible = table.visible & (table.position[:, :, None] != position)
        return self.decode_step(tokens, at)

    def reorder(self, output: ForwardOutput, parents: Tensor) -> ForwardOutput:
        """Row i becomes row `parents[i]`, long [n], of the same image, also in what the newest forward showed."""
        rows = self.to_all_branches(parents, self.rows if self.pooled else len(parents))
        if not self.pooled:
            hf.reorder(self.cache, rows)
            self.padding = self.padding[rows]
        elif self.a_row_a_sequence:
            self._select(rows)
        else:
            for table in self.tables:
                table.reorder(rows.view(-1, self.k) % self.k)
        return replace(output, early=None).map(lambda x: x[rows])  # rarely read after a step: made anew if so

    def finish_beams(self, sources: Tensor, before: list[SavedSlots]) -> None:
        """Remember what finished beams saw.

        Args:
            sources: long [n], the row that each ended, or n + its place among those that had finished.
            before: of these rows.
        """
        if self.a_row_a_sequence or not self.pooled:
            return
        n = len(sources)
        rows = torch.where(sources < n, sources % self.k, self.k + sources % self.k).view(-1, self.k)
        for table, saved in zip(self.tables, before, strict=True):
            table.finish(rows.repeat(self.ways, 1), pad_slots(saved.visible, table.capacity))

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

    def attend(
        self,
        tokens: Tensor,
        at: Tensor,
        position: Tensor,
        visible: list[Tensor],
        c: int = 1,
        prompt: bool = False,
    ) -> ForwardOutput:
        """A forward of the tokens [s, q], token `at` of the answer, at `position` of the sequence, each of which sees
        `visible`, bool [L or 1, s, q, capacity] by table.

        Args:
            c: candidates a row; `prompt`: whether the tokens are of the prompt, of which the last is the newest.
        """
        for table, seen in zip(self.tables, visible, strict=True):
            if self.masks_by_layer:
                seen = seen.expand(len(table.layers), -1, -1, -1)
            mask = self.mask_of(table, table.in_window(seen, position), c)
            by_layer = [one[:, None] for one in mask]
            self.tap.masks |= {i: by_layer[j if len(mask) > 1 else 0] for j, i in enumerate(table.indices)}
            if table is self.slots:
                first = mask
        inside = self.tap.inside
        if inside is not None:
            real = torch.ones_like(tokens, dtype=torch.bool)
            places = self.slots.position if len(self.slots.position) > 1 else None
            inside.begin(range(self.ways), prompt, self.slots.visual, real, places=places, prompt=self.prompt)
        try:
            out = self._forward(tokens, at, self.tap.masks[self.layers[0]])
        finally:
            self.tap.masks, self.tap.early = {}, None
            if inside is not None:
                inside.end()
            for table in self.tables:
                table.release(None)
        return replace(out, mask=rows_first(first)) if out.queries else out

    def mask_of(self, table: SlotTable, sees: Tensor, c: int = 1) -> Tensor:
        """What is added to the scores of queries, c a row, that see the slots `sees`, bool [L or 1, s, q, capacity]: a
        float of that shape.
        """
        dtype = table.layers[0].keys.dtype
        if dtype not in self._scalars:  # made once: numbers would be copied to the device in every step
            self._scalars[dtype] = tuple(torch.full((), x, dtype=dtype, device=sees.device) for x in (0, -torch.inf))
        bias, hidden = self._scalars[dtype]
        if table is self.slots and self.bias is not None:
            bias = pad_slots(self.bias, sees.shape[-1]).repeat_interleave(c, 2).to(dtype)
        # kernels want a float: a boolean mask would be turned into one in every layer
        return torch.where(sees, bias, hidden)

    def _forward(self, tokens: Tensor, at: Tensor, mask: Tensor | None) -> ForwardOutput:
        """Run the tokens [s, q], token `at`, [s, q], of the answer."""
        kwargs = dict(self.constant)
        for name, value in self.newest.items():
            kwargs[name] = value + at if name == "position_ids" else value.expand(*value.shape[:-1], at.shape[1])
        # attention takes the tap's masks; what the model is given only must not make it make others
        ready = not self.pooled or (not self.recurrent and hf.takes_ready_masks(self.model))
        inputs = hf.decode_inputs(self.model, tokens, self.cache, mask if ready else None, kwargs)
        out = logits = early = None
        if self.compiled is not None and self.tap.masks:
            logits = self.compiled(self.model, self.tap, inputs, self.read, self.tables)
        if logits is None:
            self.tap.clear()
            out = self.model(**inputs, return_dict=True)
            self.tap.collect()
            logits = out.logits
        if self.tap.early is not None:
            logits, early = self.tap.early.split(logits, *tokens.shape)
        return self.output_of(out, logits[:, -tokens.shape[1] :], early)

    def output_of(self, out, logits: Tensor, early: Tensor | None = None) -> ForwardOutput:
        kept, self.tap.queries = self.tap.queries, {}
        hidden, self.tap.hidden = self.tap.hidden, {}
        rows, self.tap.rows = self.tap.rows, {}
        raw = hidden.pop(LM_HEAD, None)
        if raw is not None and self.to_logits is None:
            self.to_logits = infer_logit_transform(self.model, raw, logits)
        device = self.inputs.input_ids.device
        alike: dict[torch.Size, list[int]] = {}
        for layer, query in kept.items():
            alike.setdefault(query.shape, []).append(layer)
        queries = {
            tuple(self.layers.index(layer) for layer in layers): rearrange(
                torch.stack([kept[layer].to(device) for layer in layers]), "L s h q d -> s q L h d"
            )
            for layers in alike.values()
        }
        by_layer = {(self.layers.index(i), heads): x for i, found in rows.items() for heads, x in found.items()}
        shown = ForwardOutput(logits, queries, None, hidden, by_layer, early)
        return replace(shown.map(lambda x: x.to(device)), output=out)

    def attention(self, output: ForwardOutput, layers: Sequence[int], heads: str, branch: int | None = None) -> Tensor:
        """What the newest queries of rows look at, as far as they see it: softmax rows, heads joined.

        Args:
            layers: of those that attend to the whole sequence, in ascending order.
            heads: how heads are joined, `mean` or `max`.
            branch: 0 for the main rows, 1 for those of the first branch, ...; None for all.

        Returns:
            float32 [l, m, t], or [l, m, c, t] where the output is of candidates.
        """
        own = slice(None) if branch is None else slice(branch * self.rows, (branch + 1) * self.rows)
        by_layer = {
            i: pad_slots(output.rows[i, heads][own], self.slots.capacity) for i in layers if (i, heads) in output.rows
        }
        late = [i for i in layers if i not in by_layer]
        for chosen, rows in self._rows_of_queries(output, late, heads, branch) if late else ():
            if len(chosen) == len(layers):
                return rows
            by_layer |= dict(zip(chosen, rows, strict=True))
        return torch.stack([by_layer[i] for i in layers])

    def _rows_of_queries(
        self, output: ForwardOutput, layers: list[int], heads: str, branch: int | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The same by layers whose queries have one shape, computed of queries and keys."""
        assert output.mask is not None
        each = self.sequences // self.ways
        mine = slice(None) if branch is None else slice(branch * each, (branch + 1) * each)
        mask = pad_slots(output.mask, self.slots.capacity, -torch.inf)  # there may be more slots by now
        mask = rearrange(mask.flatten(0, -3), "(s q) L t -> L s q t", s=self.sequences)[:, mine]
        for group, queries in output.queries.items():
            chosen = [i for i in layers if i in group]
            if not chosen:
                continue
            stacked = rearrange(queries.flatten(0, -4), "(s q) L h d -> L s q h d", s=self.sequences)[:, mine]
            rows = attention_rows(
                entries(stacked, [group.index(i) for i in chosen]),
                [self.slots.layers[i].keys[mine] for i in chosen],
                entries(mask, chosen) if len(mask) > 1 else mask,
                [self.tap.options[self.layers[i]] for i in chosen],
                heads,
            )
            shape = (-1, output.logits.shape[1]) if output.logits.ndim == 3 else (-1,)
            yield chosen, rows.reshape(len(chosen), *shape, rows.shape[-1])
