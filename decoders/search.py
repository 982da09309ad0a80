"""How tokens are picked from scores when every row stands for itself, and the sequences that grow by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import hf
from .tensors import pad_or_crop


@dataclass
class Sequences:
    """Prompt and what was generated, row by row. Rows move in groups: the beams of an image, or a single row.

    Attributes:
        ids: long [n, width], padded on the right where images went back and so are shorter.
        lengths: ids of each group; on the host, where they are known without asking the device.
        start: ids of the prompt.
        size: rows a group.
        pad_id: what pads.
    """

    ids: Tensor
    lengths: list[int]
    start: int
    size: int
    pad_id: int

    @property
    def same_length(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def generated(self) -> list[int]:
        """Tokens generated so far, by group."""
        return [length - self.start for length in self.lengths]

    def expand_to_rows(self, groups: list[int]) -> Tensor:
        """A figure of each group, for each row: long [n]."""
        if len(set(groups)) == 1:  # made on the device, to which nothing is copied then
            return torch.full((len(groups) * self.size,), groups[0], device=self.ids.device)
        return torch.tensor(groups, device=self.ids.device).repeat_interleave(self.size)

    def last_tokens(self) -> Tensor:
        """The newest token of each row, long [n]."""
        if self.same_length:
            return self.ids[:, -1]
        return self.ids.gather(1, self.expand_to_rows(self.lengths)[:, None] - 1)[:, 0]

    def append(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Row i becomes row `parents[i]` and `tokens[i]`."""
        ids = self.ids if parents is None else self.ids[parents]
        if self.same_length:
            self.ids = torch.cat([ids, tokens[:, None]], 1)
        else:
            at = self.expand_to_rows(self.lengths)[:, None]
            self.ids = pad_or_crop(ids, [len(ids), max(self.lengths) + 1], self.pad_id).scatter(1, at, tokens[:, None])
        self.lengths = [length + 1 for length in self.lengths]

    def group_by_length(self) -> Iterator[tuple[Tensor, int]]:
        """Indices of rows of equal length, and that length."""
        lengths = torch.tensor(self.lengths).repeat_interleave(self.size)
        for length in sorted(set(self.lengths)):
            yield (lengths == length).nonzero().flatten().to(self.ids.device), length

    def apply_logits_processors(self, processors: Callable, scores: Tensor) -> Tensor:
        """Logits processors, called as transformers calls them: with rows of one length."""
        if self.same_length:
            return processors(self.ids, scores)
        out = torch.empty_like(scores)
        for rows, length in self.group_by_length():
            out[rows] = processors(self.ids[rows, :length], scores[rows])
        return out

    def copy(self) -> Sequences:
        return replace(self)


@dataclass
class Selection:
    """What the search picked for each row.

    Attributes:
        parents: long [n], the row that each continues; None where each continues itself.
        tokens: long [n].
    """

    parents: Tensor | None
    tokens: Tensor

    def rows(self) -> Tensor:
        """long [n], `parents`, also where each row continues itself."""
        return torch.arange(len(self.tokens), device=self.tokens.device) if self.parents is None else self.parents


class SampleSearch:
    """Greedy decoding and sampling, in transformers' order of events.

    Args:
        config, stopping_criteria: as `generate` hands them over.
        sequences: the prompts.
        can_roll_back: whether rows may go back, so that some end earlier than others that are longer by now.
    """

    size = 1

    def __init__(self, config, stopping_criteria, sequences: Sequences, can_roll_back: bool = False):
        self.can_roll_back = can_roll_back
        self.config, self.criteria, self.sequences = config, stopping_criteria, sequences
        device = sequences.ids.device
        pad = hf.pad_id(config)
        self.pad_id = sequences.pad_id if pad is None else pad
        self.has_eos = hf.ends_at_eos(stopping_criteria)
        self.unfinished = torch.ones(len(sequences.ids), dtype=torch.bool, device=device)
        self.has_rolled_back = False
        self.final_lengths = sequences.expand_to_rows(sequences.lengths)  # length at which each row ended

    def to_search_scores(self, scores: Tensor) -> Tensor:
        return scores

    def select_next(self, scores: Tensor, lookahead: bool) -> Selection:
        """Pick a token for each row; `append` lets the rows grow by it."""
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self.has_eos or self.has_rolled_back:  # rows that wait for others must not go on
            tokens = torch.where(self.unfinished, tokens, self.pad_id)
        return Selection(None, tokens)

    def pad_finished(self, candidates: Tensor) -> Tensor:
        """The candidates long [n, c], pads in rows that have ended, as `select_next` picks them."""
        ended = self.has_eos or self.has_rolled_back
        return torch.where(self.unfinished[:, None], candidates, self.pad_id) if ended else candidates

    def append(self, selection: Selection, outputs) -> None:
        """Grow by the tokens picked."""
        self.sequences.append(selection.tokens)
        if self.can_roll_back:
            lengths = self.sequences.expand_to_rows(self.sequences.lengths)
            self.final_lengths = torch.where(self.unfinished, lengths, self.final_lengths)
        if self.sequences.same_length:
            stopped = self.criteria(self.sequences.ids, outputs.scores)
        else:
            stopped = torch.empty_like(self.unfinished)
            for rows, length in self.sequences.group_by_length():
                stopped[rows] = self.criteria(self.sequences.ids[rows, :length], outputs.scores)
        self.unfinished = self.unfinished & ~stopped

    def finished_beam_sources(self) -> Tensor | None:
        """None: rows end where they are."""
        return None

    def any_unfinished(self) -> Tensor:
        """bool [], whether any row goes on."""
        return self.unfinished.any()

    def save(self):
        return self.sequences.copy(), self.unfinished, self.final_lengths

    def restore(self, saved: list) -> None:
        """Group i as it was in `saved[i]`."""
        self.sequences = merge_saved_sequences(
            self.sequences, [one[0] for one in saved], [one[0].lengths[i] for i, one in enumerate(saved)]
        )
        self.unfinished, self.final_lengths = (torch.stack([one[j][i] for i, one in enumerate(saved)]) for j in (1, 2))
        self.has_rolled_back = True

    def result(self) -> tuple[Tensor, dict]:
        ids = self.sequences.ids
        return ids[:, : int(self.final_lengths.max())] if self.has_rolled_back else ids, {}


def merge_saved_sequences(now: Sequences, saved: list[Sequences], lengths: list[int]) -> Sequences:
    """Sequences whose group i is that of `saved[i]`."""
    width, k = max(lengths), now.size
    rows = [
        pad_or_crop(one.ids[i * k : (i + 1) * k, : lengths[i]], [k, width], now.pad_id) for i, one in enumerate(saved)
    ]
    return replace(now, ids=torch.cat(rows), lengths=lengths)
