"""How tokens are picked from scores when every row stands for itself, and the texts that grow by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import hf
from .state import fit


@dataclass
class Texts:
    """Prompt and what was generated, row by row. Rows move in groups: the beams of an image, or a single row.

    Attributes:
        ids: long [n, width], padded on the right where images went back and so are shorter.
        lengths: ids of each group; on the host, where they are known without asking the device.
        start: ids of the prompt.
        size: rows a group.
        fill: what pads.
    """

    ids: Tensor
    lengths: list[int]
    start: int
    size: int
    fill: int

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def generated(self) -> list[int]:
        """Tokens generated so far, by group."""
        return [length - self.start for length in self.lengths]

    def rows(self, groups: list[int]) -> Tensor:
        """A figure of each group, for each row: long [n]."""
        return torch.tensor(groups, device=self.ids.device).repeat_interleave(self.size)

    def last(self) -> Tensor:
        """The newest token of each row, long [n]."""
        return self.ids[:, -1] if self.even else self.ids.gather(1, self.rows(self.lengths)[:, None] - 1)[:, 0]

    def append(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Row i becomes row `parents[i]` and `tokens[i]`."""
        ids = self.ids if parents is None else self.ids[parents]
        if self.even:
            self.ids = torch.cat([ids, tokens[:, None]], 1)
        else:
            at = self.rows(self.lengths)[:, None]
            self.ids = fit(ids, [len(ids), max(self.lengths) + 1], self.fill).scatter(1, at, tokens[:, None])
        self.lengths = [length + 1 for length in self.lengths]

    def alike(self, per_group: int | None = None) -> Iterator[tuple[Tensor, int]]:
        """Indices of rows of equal length, and that length, of `per_group` rows a group."""
        lengths = torch.tensor(self.lengths).repeat_interleave(per_group or self.size)
        for length in sorted(set(self.lengths)):
            yield (lengths == length).nonzero().flatten().to(self.ids.device), length

    def process(self, processors: Callable, scores: Tensor) -> Tensor:
        """Logits processors, called as transformers calls them: with rows of one length."""
        if self.even:
            return processors(self.ids, scores)
        out = torch.empty_like(scores)
        for rows, length in self.alike():
            out[rows] = processors(self.ids[rows, :length], scores[rows])
        return out

    def copy(self) -> Texts:
        return replace(self)


class RowSearch:
    """Greedy decoding and sampling, in transformers' order of events."""

    size = 1

    def __init__(self, config, stopping_criteria, texts: Texts):
        self.config, self.criteria, self.texts = config, stopping_criteria, texts
        device = texts.ids.device
        pad = hf.pad_id(config)
        self.fill = texts.fill if pad is None else pad
        self.has_eos = hf.ends_at_eos(stopping_criteria)
        self.alive = torch.ones(len(texts.ids), dtype=torch.bool, device=device)
        self.went_back = False
        self.end = texts.rows(texts.lengths)  # length at which each row ended

    def scale(self, scores: Tensor) -> Tensor:
        return scores

    def pick(self, scores: Tensor, lookahead: bool) -> tuple[Tensor | None, Tensor]:
        """Parents (None: each row goes on itself) and tokens, long [n]."""
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self.has_eos or self.went_back:  # rows that wait for others must not go on
            tokens = torch.where(self.alive, tokens, self.fill)
        return None, tokens

    def advance(self, parents: Tensor | None, tokens: Tensor, outputs) -> None:
        """Grow by the tokens picked."""
        self.texts.append(tokens)
        self.end = torch.where(self.alive, self.texts.rows(self.texts.lengths), self.end)
        if self.texts.even:
            stopped = self.criteria(self.texts.ids, outputs.scores)
        else:
            stopped = torch.empty_like(self.alive)
            for rows, length in self.texts.alike():
                stopped[rows] = self.criteria(self.texts.ids[rows, :length], outputs.scores)
        self.alive = self.alive & ~stopped

    def entered(self) -> Tensor | None:
        """None: rows end where they are."""
        return None

    def running(self) -> Tensor:
        """bool [], whether any row goes on."""
        return self.alive.any()

    def save(self):
        return self.texts.copy(), self.alive, self.end

    def restore(self, saved: list) -> None:
        """Group i as it was in `saved[i]`."""
        self.texts = restored(self.texts, [one[0] for one in saved], [one[0].lengths[i] for i, one in enumerate(saved)])
        self.alive, self.end = (torch.stack([one[j][i] for i, one in enumerate(saved)]) for j in (1, 2))
        self.went_back = True

    def result(self) -> tuple[Tensor, dict]:
        return self.texts.ids[:, : int(self.end.max())] if self.went_back else self.texts.ids, {}


def restored(now: Texts, saved: list[Texts], lengths: list[int]) -> Texts:
    """Texts whose group i is that of `saved[i]`."""
    width, k = max(lengths), now.size
    rows = [fit(one.ids[i * k : (i + 1) * k, : lengths[i]], [k, width], now.fill) for i, one in enumerate(saved)]
    return replace(now, ids=torch.cat(rows), lengths=lengths)
