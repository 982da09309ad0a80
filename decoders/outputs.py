"""What `return_dict_in_generate` collects."""

from __future__ import annotations

import torch
from torch import Tensor

from . import hf
from .search import Sequences


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
