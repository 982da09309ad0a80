"""Beam search, equal to transformers' own: which beams go on, and which finished ones are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .search import Selection, Sequences, merge_saved_sequences
from .tensors import pad_or_crop

EXCLUDED_SCORE = -1.0e9  # the score of what cannot be chosen, transformers' figure


@dataclass
class BeamContinuations:
    """Continuations of one step, best first, some of which end. g images, c continuations.

    Attributes:
        ids: long [g, c, width], prompt, answer and the new token; shorter ones are padded on the right.
        lengths: ids of each image's continuations.
        generated: answer tokens among them.
        scores: float32 [g, c], sums of log-probabilities.
        is_stopped: bool [g, c].
        parents: long [g, c], the row that each continues.
        indices: long [g, c, generated], the row that each token came from.
        running_scores: float32 [g, k], scores of the beams that go on, best first.
        image_active: bool [g], false for images that were closed before.
    """

    ids: Tensor
    lengths: list[int]
    generated: list[int]
    scores: Tensor
    is_stopped: Tensor
    parents: Tensor
    indices: Tensor
    running_scores: Tensor
    image_active: Tensor


class Hypotheses:
    """Finished beams as transformers keeps them; a subclass may score, order and restore them otherwise.

    Args:
        config: the generation config (`num_beams`, `length_penalty`, `early_stopping`, `max_length`).
        sequences: the prompts, a row a beam.

    Attributes:
        sources: long [g, k], set by `update`: for each finished beam the row that it ended, or g * k + its place among
            those that there were. None where a subclass does not say; then it is not known what finished beams saw.
    """

    sources: Tensor | None = None

    def __init__(self, config: hf.GenerationConfig, sequences: Sequences):
        self.config, self.k = config, config.num_beams
        g, device = len(sequences.lengths), sequences.ids.device
        self.max_new_tokens = config.max_length - sequences.start
        self.ids = rearrange(sequences.ids, "(g k) w -> g k w", k=self.k)
        self.scores = torch.full((g, self.k), EXCLUDED_SCORE, device=device)
        self.done = torch.zeros(g, self.k, dtype=torch.bool, device=device)
        self.indices = torch.full((g, self.k, 0), -1, dtype=torch.int32, device=device)
        self.can_improve = torch.ones(g, 1, dtype=torch.bool, device=device)
        self.pad_id = sequences.pad_id

    def update(self, new: BeamContinuations) -> None:
        """Let the continuations that ended, if among the k best of their image, join the finished beams."""
        candidates = new.is_stopped & (torch.arange(new.is_stopped.shape[1], device=new.is_stopped.device) < self.k)
        scores = new.scores / self._length_penalty(new.generated)
        scores = scores + (self.done.all(-1, keepdim=True) & (self.config.early_stopping is True)) * EXCLUDED_SCORE
        scores = scores + ~self.can_improve * EXCLUDED_SCORE + ~candidates * EXCLUDED_SCORE
        width, steps = max(self.ids.shape[2], new.ids.shape[2]), max(self.indices.shape[2], new.indices.shape[2])
        g, c = scores.shape
        old = {
            "ids": pad_or_crop(self.ids, [g, self.k, width], self.pad_id),
            "indices": pad_or_crop(self.indices, [g, self.k, steps], -1),
            "scores": self.scores,
            "done": self.done,
        }
        ids, indices = pad_or_crop(new.ids, [g, c, width], self.pad_id), pad_or_crop(new.indices, [g, c, steps], -1)
        merged_scores, best = torch.cat([self.scores, scores], 1).topk(self.k)
        merged = {"scores": merged_scores, "done": torch.cat([self.done, candidates], 1).gather(1, best)}
        for name, more in (("ids", ids), ("indices", indices)):
            merged[name] = torch.cat([old[name], more], 1).gather(1, best[:, :, None].expand(-1, -1, more.shape[2]))
        # where each finished beam comes from: row of the continuation, or g*k and up for those that were there
        places = torch.arange(g * self.k, device=best.device).view(g, self.k) + g * self.k
        self.sources = torch.where(
            new.image_active[:, None] & merged["done"], torch.cat([places, new.parents], 1).gather(1, best), places
        )
        for name, value in merged.items():
            setattr(self, name, torch.where(new.image_active.view(-1, *[1] * (value.ndim - 1)), value, old[name]))
        # can a running beam still beat the worst finished one?
        lengths = (
            new.generated
            if not (self.config.early_stopping == "never" and self.config.length_penalty > 0)
            else [self.max_new_tokens] * g
        )
        possible = new.running_scores[:, :1] / self._length_penalty(lengths)
        worst = torch.where(self.done, self.scores.min(1, keepdim=True)[0], EXCLUDED_SCORE)
        self.can_improve = self.can_improve & (possible > worst).any(-1, keepdim=True)

    def is_done(self) -> Tensor:
        """bool [g], images that need no more steps."""
        full = self.done.all(-1) & (self.config.early_stopping is True)
        return full | ~self.can_improve[:, 0]

    def finalize(self, count: int, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` best of each image: ids [g*count, width], scores [g*count], indices [g*count, generated], -1 past
        the end.
        """
        ids, scores, indices = (
            rearrange(x[:, :count], "g c ... -> (g c) ...") for x in (self.ids, self.scores, self.indices)
        )
        longest = int((indices >= 0).sum(1).max()) if indices.shape[1] else 0
        return (
            pad_or_crop(ids, [len(ids), max(ids.shape[1], sequences.start + longest)], self.pad_id)[
                :, : sequences.start + longest
            ],
            scores,
            indices[:, :longest],
        )

    def save(self) -> object:
        """What `restore` needs to return here."""
        return dict(self.__dict__)

    def restore(self, saved: list) -> None:
        """Make the finished beams of image i those of `saved[i]`."""
        for name in ("ids", "scores", "done", "indices", "can_improve"):
            parts = [one[name][i : i + 1] for i, one in enumerate(saved)]
            shape = [max(s) for s in zip(*(p.shape[1:] for p in parts), strict=True)]
            setattr(
                self,
                name,
                torch.cat(
                    [pad_or_crop(p, [1, *shape], {"ids": self.pad_id, "indices": -1}.get(name, 0)) for p in parts]
                ),
            )

    def _length_penalty(self, lengths: list[int]) -> Tensor:
        """length ** length_penalty, [g, 1]."""
        return torch.tensor(
            [[length**self.config.length_penalty] for length in lengths], dtype=torch.float32, device=self.scores.device
        )


@dataclass
class BeamSelection(Selection):
    """The beams that go on, and what they were chosen from.

    Attributes:
        continuations: the best of the step.
        places: long [g, k], which of them go on.
    """

    continuations: BeamContinuations
    places: Tensor


class BeamSearch:
    """The beams of each image, all of one length."""

    def __init__(self, config, stopping_criteria, sequences: Sequences, hypotheses: Hypotheses | None):
        self.config, self.criteria, self.sequences = config, stopping_criteria, sequences
        self.size = config.num_beams
        self.hypotheses = hypotheses or Hypotheses(config, sequences)
        g, device = len(sequences.lengths), sequences.ids.device
        self.beams_to_keep = max(2, 1 + len(hf.eos_ids(config))) * self.size
        # only the first beam counts at first, or all would say the same
        self.scores = torch.full((g, self.size), EXCLUDED_SCORE, device=device)
        self.scores[:, 0] = 0.0
        self.indices = torch.zeros(g * self.size, 0, dtype=torch.int32, device=device)
        self.image_active = torch.ones(g, dtype=torch.bool, device=device)

    @property
    def unfinished(self) -> Tensor:
        return self.image_active.repeat_interleave(self.size)

    def to_search_scores(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)

    def select_next(self, scores: Tensor, lookahead: bool) -> BeamSelection:
        """Pick the beams that go on; `append` lets them grow, and what ended join the finished beams."""
        vocabulary = scores.shape[1]
        total = rearrange(scores, "(g k) v -> g k v", k=self.size) + self.scores[:, :, None]
        total = rearrange(total, "g k v -> g (k v)")
        if self.config.do_sample:
            probabilities = total.softmax(-1)
            if lookahead:  # fewer candidates than draws: what cannot be chosen is drawn last
                probabilities = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny)
            chosen = torch.multinomial(probabilities, num_samples=self.beams_to_keep)
            best = total.gather(1, chosen)
            if hf.SORTS_SAMPLED_BEAMS:
                best, order = best.sort(descending=True)
                chosen = chosen.gather(1, order)
        else:
            best, chosen = total.topk(self.beams_to_keep)
        g, offset = len(total), torch.arange(len(total), device=total.device)[:, None] * self.size
        parents, tokens = chosen // vocabulary + offset, chosen % vocabulary  # [g, width]
        flat = parents.flatten()
        extended = replace(self.sequences, size=self.beams_to_keep)
        extended.append(tokens.flatten(), flat)
        if extended.same_length:
            ends = self.criteria(extended.ids, self._history)
        else:
            ends = torch.empty(g * self.beams_to_keep, dtype=torch.bool, device=total.device)
            for rows, length in extended.group_by_length():
                ends[rows] = self.criteria(extended.ids[rows, :length], self._history)
        ends = rearrange(ends, "(g c) -> g c", g=g)
        next_scores, places = (best + ends * EXCLUDED_SCORE).topk(self.size)
        indices = self._append_beam_indices(flat, extended)
        continuations = BeamContinuations(
            rearrange(extended.ids, "(g c) w -> g c w", g=g),
            extended.lengths,
            extended.generated,
            best,
            ends,
            parents,
            rearrange(indices, "(g c) s -> g c s", g=g),
            next_scores,
            self.image_active,
        )
        return BeamSelection(
            parents.gather(1, places).flatten(), tokens.gather(1, places).flatten(), continuations, places
        )

    _history = None  # scores of all steps, for stopping criteria that ask for them

    def _append_beam_indices(self, parents: Tensor, extended: Sequences) -> Tensor:
        """`indices` of the continuations: those of the parents, and the parents themselves."""
        wide = pad_or_crop(self.indices, [len(self.indices), max(extended.generated)], -1)[parents]
        return wide.scatter(
            1, extended.expand_to_rows(extended.generated)[:, None] - 1, parents[:, None].to(wide.dtype)
        )

    def pad_finished(self, candidates: Tensor) -> Tensor:
        """The candidates long [n, c] as they are: rows go on until their image has ended."""
        return candidates

    def append(self, selection: Selection, outputs) -> None:
        """Let what ended join the finished beams, and grow by the tokens picked."""
        assert isinstance(selection, BeamSelection)
        new, places = selection.continuations, selection.places
        self.hypotheses.update(new)
        self.sequences.append(selection.tokens, selection.parents)
        self.scores = new.running_scores
        chosen = new.indices.gather(1, places[:, :, None].expand(-1, -1, new.indices.shape[2]))
        self.indices = rearrange(chosen, "g k s -> (g k) s")
        self.image_active = self.image_active & ~self.hypotheses.is_done() & ~new.is_stopped.all(-1)
        self._history = outputs.scores

    def finished_beam_sources(self) -> Tensor | None:
        """For each finished beam the row that it ended, long [n], or n + its place among those that were there before;
        None if not known.
        """
        sources = self.hypotheses.sources
        return None if sources is None else sources.flatten()

    def any_unfinished(self) -> Tensor:
        """bool [], whether any image goes on."""
        return self.image_active.any()

    def save(self):
        return self.sequences.copy(), self.scores, self.indices, self.image_active, self.hypotheses.save()

    def restore(self, saved: list) -> None:
        """Image i as it was in `saved[i]`."""
        lengths = [one[0].lengths[i] for i, one in enumerate(saved)]
        self.sequences = merge_saved_sequences(self.sequences, [one[0] for one in saved], lengths)
        self.scores = torch.stack([one[1][i] for i, one in enumerate(saved)])
        steps, k = max(self.sequences.generated), self.size
        self.indices = torch.cat(
            [pad_or_crop(one[2][i * k : (i + 1) * k, :steps], [k, steps], -1) for i, one in enumerate(saved)]
        )
        self.image_active = torch.stack([one[3][i] for i, one in enumerate(saved)])
        self.hypotheses.restore([one[4] for one in saved])

    def result(self) -> tuple[Tensor, dict]:
        ids, scores, indices = self.hypotheses.finalize(self.config.num_return_sequences, self.sequences)
        return ids, {"sequences_scores": scores, "beam_indices": indices}
