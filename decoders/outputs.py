"""What forwards show, and what `return_dict_in_generate` collects of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import hf
from .kv_pool import SlotMove
from .search import Selection, Sequences


@dataclass
class ForwardOutput:
    """What a forward showed at the newest tokens. [m, ...] for one token a row, [m, c, ...] for c candidates each.

    Attributes:
        logits: [m, v].
        queries: [m, L, h, d] by layers of one shape, of those whose attention is read; layers are counted among those
            that attend to the whole sequence.
        mask: float [m, L or 1, t], what was added to the scores of these queries; None where none is read.
        hidden: [m, d] by index of the hidden state; and what decoders exported, [m, ...], by decoder and name.
        rows: in place of queries where decoders change attention: float32 [m, t] by layer and reduction of heads.
        early: [n, e, v], logits of early layers of the main rows, where they were made with the model's own
            (`early.py`); else None.
        output: what the model returned.
        is_rerun: whether this was the second run of the last prompt token.
        parts: what was made of it for the decoders.
    """

    logits: Tensor
    queries: dict[tuple[int, ...], Tensor]
    mask: Tensor | None
    hidden: dict[Any, Tensor]
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    early: Tensor | None = None
    output: Any = None
    is_rerun: bool = False
    parts: dict[tuple, Tensor] = field(default_factory=dict)

    def part(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """What decoders read of it, made once."""
        if key not in self.parts:
            self.parts[key] = make()
        return self.parts[key]

    def map(self, change: Callable[[Tensor], Tensor]) -> ForwardOutput:
        """With every tensor changed."""
        return replace(
            self,
            logits=change(self.logits),
            queries={k: change(v) for k, v in self.queries.items()},
            mask=None if self.mask is None else change(self.mask),
            hidden={k: change(v) for k, v in self.hidden.items()},
            rows={k: change(v) for k, v in self.rows.items()},
            early=None if self.early is None else change(self.early),
            parts={},
        )

    def move_slots(self, move: SlotMove) -> ForwardOutput:
        """The same after slots of the layers that decoders read were moved."""

        def rows(layer: int, x: Tensor) -> Tensor:
            moved = move.rows_first(x[:, None], 0)
            return moved[:, layer if moved.shape[1] > 1 else 0]

        return replace(
            self,
            mask=None if self.mask is None else move.rows_first(self.mask, -torch.inf),
            rows={(layer, heads): rows(layer, x) for (layer, heads), x in self.rows.items()},
            parts={},
        )


@dataclass
class CandidateRun:
    """What running c candidates of each row showed, before one is picked.

    Attributes:
        tokens: long [n, c].
        output: [m, c, ...].
        own: bool [s, k, c, capacity] by table, the slot of each candidate.
        length: slots used before; candidates may lie among them, in slots that were free.
    """

    tokens: Tensor
    output: ForwardOutput
    own: list[Tensor]
    length: int

    def with_itself(self, rows: Tensor) -> Tensor:
        """Attention of the candidates, float [l, n, c, t], over the slots before them and, last, each itself:
        [l, n, c, length + 1].
        """
        own = self.own[0].flatten(0, 1)[: rows.shape[1]]  # [n, c, t]
        before = rows[..., : self.length].masked_fill(own[..., : self.length], 0)
        return torch.cat([before, rows.where(own, 0).sum(-1, keepdim=True)], -1)

    def find(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """long [n], which candidate of the row that it continues each row picked; bool [n], whether it is one."""
        tokens = self.tokens if selection.parents is None else self.tokens[selection.parents]
        match = tokens == selection.tokens[:, None]
        return match.long().argmax(1), match.any(1)


class StepOutputs:
    """Scores, logits, attentions and hidden states by token of the answer, those that were asked for.

    Args:
        config: the generation config.
        rows: n.
        first: long [n], the row of the prefill that each comes from.
    """

    def __init__(self, config, rows: int, first: Tensor):
        self.rows, self.first = rows, first
        asked = config.return_dict_in_generate
        names = ("scores", "logits", "attentions", "hidden_states")
        self.kept: dict[str, list] = {name: [] for name in names if asked and getattr(config, f"output_{name}")}

    @property
    def scores(self) -> tuple | None:
        """float [n, v] by token, or None where nobody asked."""
        return tuple(self.kept["scores"]) if "scores" in self.kept else None

    def add(self, output, logits: Tensor, scores: Tensor, sequences: Sequences) -> None:
        """Those of a step.

        Args:
            output: what the model returned, or None.
            logits, scores: float32 [n, v].
        """
        for name, values in self.kept.items():
            if name in ("attentions", "hidden_states"):
                rows = self.first if not values else torch.arange(self.rows, device=logits.device)
                shown = output.get(name)
                values.append(None if shown is None else tuple(layer[rows] for layer in shown))
                continue
            value = logits if name == "logits" else scores
            if sequences.same_length:
                values[sequences.generated[0] :] = [value]
                continue
            for rows, length in sequences.group_by_length():
                index = length - sequences.start
                values += [torch.zeros_like(value) for _ in range(index + 1 - len(values))]
                values[index] = values[index].index_copy(0, rows, value[rows])

    def crop(self, length: int) -> None:
        """Forget what came after so many tokens."""
        for values in self.kept.values():
            del values[length:]

    def result(self, ids: Tensor, cache: hf.Cache, beams: dict):
        """What `generate` returns; `beams` are the entries that only beam search has."""
        values = {name: tuple(values) for name, values in self.kept.items()}
        if not beams:
            return hf.generate_output(ids, cache, values)
        if "scores" not in values:
            beams = {**beams, "sequences_scores": None}
        return hf.generate_output(ids, cache, values, beams)
