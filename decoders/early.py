"""Logits of early layers, made in the product that makes the model's own.

At a decode step that product is bound by reading the output embeddings. Early hidden states that join the newest ones
share that one reading, and what the model does to logits afterwards, a scale or a cap.

Made apart, where they are read, are the logits of the prompt, of branches, and of candidates: only those of the picked
ones are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .errors import StackError
from .interface import Requirements
from .outputs import ForwardOutput

Key = tuple[bool, int]  # whether the final norm acts first; index of the hidden state


def early_keys(model, needs: Requirements) -> tuple[Key, ...]:
    """What a decoder reads, in its order. The last hidden state is behind the final norm already."""
    return tuple((needs.early_norm and i < hf.num_layers(model), i) for i in needs.early_logits)


@dataclass(frozen=True)
class EarlyLogits:
    """The early layers whose logits are read.

    Attributes:
        keys: ascending, so that those without the norm come first.
        norm: the final norm, or None where none of them needs it.
        ways: the main rows and branches; only logits of the main rows are made together with the model's own.
    """

    keys: tuple[Key, ...]
    norm: Any
    ways: int

    @classmethod
    def of(cls, model, keys: Iterable[Key], ways: int) -> EarlyLogits | None:
        """Those that some decoder reads, or None."""
        every = tuple(sorted(set(keys)))
        return cls(every, hf.final_norm(model) if any(normed for normed, _ in every) else None, ways) if every else None

    def inputs(self, hidden: dict[int, Tensor], keys: Sequence[Key]) -> Tensor:
        """What the output embeddings get of hidden states [s, q, d] or [n, d]: [e, ...], in the order of `keys`, which
        ascends.
        """
        plain, normed = ([hidden[i] for norm, i in keys if norm == want] for want in (False, True))
        parts = [torch.stack(plain)] if plain else []
        if normed:
            parts.append(self.norm(torch.stack(normed)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def join(self, newest: Tensor, hidden: dict[int, Tensor]) -> Tensor:
        """What the output embeddings get in place of `newest`, [s, q, d]: [1, rows, d], which are the early hidden
        states of the main sequences and then the newest; as it was where hidden states are of another shape.
        """
        if any(hidden[i].shape != newest.shape for _, i in self.keys):
            return newest
        main = {i: hidden[i][: len(newest) // self.ways].to(newest) for _, i in self.keys}
        return torch.cat([self.inputs(main, self.keys).flatten(0, 2), newest.flatten(0, 1)])[None]

    def split(self, logits: Tensor, s: int, q: int) -> tuple[Tensor, Tensor | None]:
        """The model's own logits, [s, q, v], of what it made of joined rows; and those of the early layers of the main
        sequences, [s', q, e, v], or None where they had not been joined.
        """
        early = len(self.keys) * (s // self.ways) * q
        rows = logits.flatten(0, 1)
        if len(rows) != early + s * q:
            return logits, None
        return rows[early:].view(s, q, -1), rearrange(rows[:early], "(e s q) v -> s q e v", e=len(self.keys), q=q)

    def read(
        self,
        output: ForwardOutput,
        keys: Sequence[Key],
        branch: int,
        to_logits: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """float32 [e, n, v], logits of the main rows (0) or a branch's, in the order of `keys`; by a product of their
        own where the forward did not make them.
        """
        if output.early is not None and branch == 0:
            places = [self.keys.index(key) for key in keys]
            together = places == list(range(places[0], places[0] + len(places)))
            chosen = output.early[:, places[0] : places[-1] + 1] if together else output.early[:, places]
            return chosen.transpose(0, 1).float()
        if to_logits is None:
            raise StackError("this model makes its logits without its output embeddings, so early layers have none")
        n = len(output.logits) // self.ways
        every = sorted(set(keys))
        logits = to_logits(self.inputs({i: output.hidden[i][branch * n : (branch + 1) * n] for _, i in every}, every))
        return logits if every == list(keys) else logits[[every.index(key) for key in keys]]
