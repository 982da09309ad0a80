"""Beam search, equal to transformers' own: which beams go on, and which finished ones are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from . import hf
from .search import Texts, restored
from .state import fit

OUT = -1.0e9  # the score of what cannot be chosen, transformers' figure


@dataclass
class Finished:
    """Continuations of one step, best first, some of which end. g images, c continuations.

    Attributes:
        ids: long [g, c, width], prompt, answer and the new token; shorter ones are padded on the right.
        lengths: ids of each image's continuations.
        generated: answer tokens among them.
        scores: float32 [g, c], sums of log-probabilities.
        ends: bool [g, c].
        parents: long [g, c], the row that each continues.
        indices: long [g, c, generated], the row that each token came from.
        running: float32 [g, k], scores of the beams that go on, best first.
        open: bool [g], false for images that were closed before.
    """

    ids: Tensor
    lengths: list[int]
    generated: list[int]
    scores: Tensor
    ends: Tensor
    parents: Tensor
    indices: Tensor
    running: Tensor
    open: Tensor


class Hypotheses:
    """Finished beams as transformers keeps them; a subclass may score, order and restore them otherwise.

    Args:
        config: the generation config (`num_beams`, `length_penalty`, `early_stopping`, `max_length`).
        texts: the prompts, a row a beam.
    """

    def __init__(self, config, texts: Texts):
        self.config, self.k = config, config.num_beams
        g, device = len(texts.lengths), texts.ids.device
        self.longest = config.max_length - texts.start
        self.ids = rearrange(texts.ids, "(g k) w -> g k w", k=self.k)
        self.scores = torch.full((g, self.k), OUT, device=device)
        self.done = torch.zeros(g, self.k, dtype=torch.bool, device=device)
        self.indices = torch.full((g, self.k, 0), -1, dtype=torch.int32, device=device)
        self.improvable = torch.ones(g, 1, dtype=torch.bool, device=device)
        self.fill = texts.fill

    def update(self, new: Finished) -> None:
        """Let the continuations that ended, if among the k best of their image, join the finished beams."""
        candidates = new.ends & (torch.arange(new.ends.shape[1], device=new.ends.device) < self.k)
        scores = new.scores / self._power(new.generated)
        scores = scores + (self.done.all(-1, keepdim=True) & (self.config.early_stopping is True)) * OUT
        scores = scores + ~self.improvable * OUT + ~candidates * OUT
        width, steps = max(self.ids.shape[2], new.ids.shape[2]), max(self.indices.shape[2], new.indices.shape[2])
        g, c = scores.shape
        old = {
            "ids": fit(self.ids, [g, self.k, width], self.fill),
            "indices": fit(self.indices, [g, self.k, steps], -1),
            "scores": self.scores,
            "done": self.done,
        }
        ids, indices = fit(new.ids, [g, c, width], self.fill), fit(new.indices, [g, c, steps], -1)
        merged_scores, best = torch.cat([self.scores, scores], 1).topk(self.k)
        merged = {"scores": merged_scores, "done": torch.cat([self.done, candidates], 1).gather(1, best)}
        for name, more in (("ids", ids), ("indices", indices)):
            merged[name] = torch.cat([old[name], more], 1).gather(1, best[:, :, None].expand(-1, -1, more.shape[2]))
        # where each finished beam comes from: row of the continuation, or g*k and up for those that were there
        places = torch.arange(g * self.k, device=best.device).view(g, self.k) + g * self.k
        self.taken = torch.where(
            new.open[:, None] & merged["done"], torch.cat([places, new.parents], 1).gather(1, best), places
        )
        for name, value in merged.items():
            setattr(self, name, torch.where(new.open.view(-1, *[1] * (value.ndim - 1)), value, old[name]))
        # can a running beam still beat the worst finished one?
        lengths = (
            new.generated
            if not (self.config.early_stopping == "never" and self.config.length_penalty > 0)
            else [self.longest] * g
        )
        possible = new.running[:, :1] / self._power(lengths)
        worst = torch.where(self.done, self.scores.min(1, keepdim=True)[0], OUT)
        self.improvable = self.improvable & (possible > worst).any(-1, keepdim=True)

    def closed(self) -> Tensor:
        """bool [g], images that need no more steps."""
        full = self.done.all(-1) & (self.config.early_stopping is True)
        return full | ~self.improvable[:, 0]

    def best(self, count: int, texts: Texts, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` best of each image: ids [g*count, width], scores [g*count], indices [g*count, generated], -1 past
        the end.
        """
        ids, scores, indices = (
            rearrange(x[:, :count], "g c ... -> (g c) ...") for x in (self.ids, self.scores, self.indices)
        )
        longest = int((indices >= 0).sum(1).max()) if indices.shape[1] else 0
        return (
            fit(ids, [len(ids), max(ids.shape[1], texts.start + longest)], self.fill)[:, : texts.start + longest],
            scores,
            indices[:, :longest],
        )

    def save(self) -> object:
        """What `restore` needs to return here."""
        return dict(self.__dict__)

    def restore(self, saved: list) -> None:
        """Make the finished beams of image i those of `saved[i]`."""
        for name in ("ids", "scores", "done", "indices", "improvable"):
            parts = [one[name][i : i + 1] for i, one in enumerate(saved)]
            shape = [max(s) for s in zip(*(p.shape[1:] for p in parts), strict=True)]
            setattr(
                self,
                name,
                torch.cat([fit(p, [1, *shape], {"ids": self.fill, "indices": -1}.get(name, 0)) for p in parts]),
            )

    def _power(self, lengths: list[int]) -> Tensor:
        """length ** length_penalty, [g, 1]."""
        return torch.tensor(
            [[length**self.config.length_penalty] for length in lengths], dtype=torch.float32, device=self.scores.device
        )


class BeamSearch:
    """The beams of each image, all of one length."""

    def __init__(self, config, stopping_criteria, texts: Texts, hypotheses: Hypotheses | None):
        self.config, self.criteria, self.texts = config, stopping_criteria, texts
        self.size = config.num_beams
        self.hypotheses = hypotheses or Hypotheses(config, texts)
        g, device = len(texts.lengths), texts.ids.device
        self.width = max(2, 1 + len(hf.eos_ids(config))) * self.size
        # only the first beam counts at first, or all would say the same
        self.scores = torch.full((g, self.size), OUT, device=device)
        self.scores[:, 0] = 0.0
        self.indices = torch.zeros(g * self.size, 0, dtype=torch.int32, device=device)
        self.open = torch.ones(g, dtype=torch.bool, device=device)

    @property
    def alive(self) -> Tensor:
        return self.open.repeat_interleave(self.size)

    def scale(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)

    def pick(self, scores: Tensor, lookahead: bool) -> tuple[Tensor, Tensor]:
        """Parents and tokens of the beams that go on, long [n]; `advance` keeps the books."""
        vocabulary = scores.shape[1]
        total = rearrange(scores, "(g k) v -> g k v", k=self.size) + self.scores[:, :, None]
        total = rearrange(total, "g k v -> g (k v)")
        if self.config.do_sample:
            probabilities = total.softmax(-1)
            if lookahead:  # fewer candidates than draws: what cannot be chosen is drawn last
                probabilities = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny)
            chosen = torch.multinomial(probabilities, num_samples=self.width)
            best = total.gather(1, chosen)
            if hf.SORTS_SAMPLED_BEAMS:
                best, order = best.sort(descending=True)
                chosen = chosen.gather(1, order)
        else:
            best, chosen = total.topk(self.width)
        g, offset = len(total), torch.arange(len(total), device=total.device)[:, None] * self.size
        parents, tokens = chosen // vocabulary + offset, chosen % vocabulary  # [g, width]
        flat = parents.flatten()
        grown = replace(self.texts, size=self.width)
        grown.append(tokens.flatten(), flat)
        ends = torch.empty(g * self.width, dtype=torch.bool, device=total.device)
        for rows, length in grown.alike():
            ends[rows] = self.criteria(grown.ids[rows, :length], self._history)
        ends = rearrange(ends, "(g c) -> g c", g=g)
        going, places = (best + ends * OUT).topk(self.size)
        indices = self._written(flat, grown)
        self._new = Finished(
            rearrange(grown.ids, "(g c) w -> g c w", g=g),
            grown.lengths,
            grown.generated,
            best,
            ends,
            parents,
            rearrange(indices, "(g c) s -> g c s", g=g),
            going,
            self.open,
        )
        self._places = rearrange(places + torch.arange(g, device=places.device)[:, None] * self.width, "g k -> (g k)")
        return parents.gather(1, places).flatten(), tokens.gather(1, places).flatten()

    _history = None  # scores of all steps, for stopping criteria that ask for them

    def _written(self, parents: Tensor, grown: Texts) -> Tensor:
        """`indices` of the continuations: those of the parents, and the parents themselves."""
        wide = fit(self.indices, [len(self.indices), max(grown.generated)], -1)[parents]
        return wide.scatter(1, grown.rows(grown.generated)[:, None] - 1, parents[:, None].to(wide.dtype))

    def advance(self, parents: Tensor | None, tokens: Tensor, outputs) -> None:
        """Let what ended join the finished beams, and grow by the tokens picked."""
        new = self._new
        self.hypotheses.update(new)
        self.texts.append(tokens, parents)
        self.scores = new.running
        self.indices = rearrange(new.indices, "g c s -> (g c) s")[self._places]
        self.open = self.open & ~self.hypotheses.closed() & ~new.ends.all(-1)
        self._history = outputs.scores

    def entered(self) -> Tensor | None:
        """For each finished beam the row that it ended, long [n], or n + its place among those that were there before;
        None if not known.
        """
        taken = getattr(self.hypotheses, "taken", None)
        return None if taken is None else taken.flatten()

    def running(self) -> Tensor:
        """bool [], whether any image goes on."""
        return self.open.any()

    def save(self):
        return self.texts.copy(), self.scores, self.indices, self.open, self.hypotheses.save()

    def restore(self, saved: list) -> None:
        """Image i as it was in `saved[i]`."""
        lengths = [one[0].lengths[i] for i, one in enumerate(saved)]
        self.texts = restored(self.texts, [one[0] for one in saved], lengths)
        self.scores = torch.stack([one[1][i] for i, one in enumerate(saved)])
        steps, k = max(self.texts.generated), self.size
        self.indices = torch.cat(
            [fit(one[2][i * k : (i + 1) * k, :steps], [k, steps], -1) for i, one in enumerate(saved)]
        )
        self.open = torch.stack([one[3][i] for i, one in enumerate(saved)])
        self.hypotheses.restore([one[4] for one in saved])

    def result(self) -> tuple[Tensor, dict]:
        ids, scores, indices = self.hypotheses.best(self.config.num_return_sequences, self.texts, self.scores)
        return ids, {"sequences_scores": scores, "beam_indices": indices}
