"""OPERA as its official code decodes, quirks included: one image, at least two beams. Used by
`OPERA(faithful=True)`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoders import (
    BeamContinuations,
    Candidates,
    GenerationContext,
    Hypotheses,
    Rollback,
    StackError,
    Step,
    persistent,
)

if TYPE_CHECKING:
    from .opera import OPERA

FLOOR = -999.0  # score of what is no candidate
HISTORY = 513  # steps that can be gone back


@dataclass
class _State:
    """products: of each column, [n, answer]; votes: one row of all beams' votes a step, [n, answer, beams], which do
    not move with the beams.
    What outlasts a return: tried, rejected, as lists of the one image; chosen_again: the place whose next choice is
    unrestricted.
    """

    prompt: int
    products: Tensor
    votes: Tensor
    tried: dict[int, int] = persistent()
    rejected: dict[int, list[tuple[int, int]]] = persistent()
    pending: dict = persistent()
    told: list[dict] = persistent()

    @property
    def returns(self) -> Tensor:
        rows = [[r["at"], r["anchor"], r["kept"]] for r in self.told]
        return torch.tensor(rows, dtype=torch.long).view(1, -1, 3).expand(len(self.products), -1, -1)


def init_state(opera: OPERA, context: GenerationContext) -> _State:
    if context.rows != 1 or context.config.num_beams < 2:
        raise StackError(
            f"opera: faithful=true is the official code, which decodes one image with at least 2 beams, not"
            f" {context.rows} with {context.config.num_beams}; use faithful=false"
        )
    k = context.config.num_beams
    return _State(
        context.prompt,
        torch.ones(1, 0, device=context.device),
        torch.zeros(1, 0, k, dtype=torch.long, device=context.device),
        {},
        {},
        {},
        [],
    )


def rescore_candidates(opera: OPERA, step: Step, candidates: Candidates, state: _State) -> tuple[Tensor, Tensor | None]:
    length = step.max_num_forwards
    generated = length - 1
    state.products = _grown(opera, step, state)
    attention = candidates.requested("attention")[0]  # [k, c, t]
    weights = opera._weights(candidates.attention_by_position(0, state.prompt + length), attention)
    rows = weights[..., state.prompt :]  # [k, c, length]
    products = torch.cat([state.products, state.products.new_ones(len(rows), 1)], 1)[:, None] * rows
    local, column = (1e-7 * products).half().float().max(-1)  # the code's buffer is float16 whatever the model
    image = (attention * candidates.requested("visual")[-1][:, None]).sum(-1) / attention.sum(-1)
    cost = -opera.penalty * image if length <= 10 else (opera.penalty * local.half()).float()
    judged = candidates.scores - cost
    vote = column.mode(-1)[0]  # [k]
    logits = step.logits
    again = state.pending.pop("again", None)
    state.votes = torch.cat([state.votes, vote[None, None].expand(len(vote), 1, -1)], 1)
    if again is not None:  # the whole vocabulary, without penalties
        free = logits - (999 + logits.min(-1, keepdim=True)[0])
        flat = free.flatten()
        flat[[beam * logits.shape[1] + token for beam, token in state.rejected[again]]] = FLOOR
        return flat.view_as(free).log_softmax(-1), None
    out = torch.full_like(logits, FLOOR).scatter_(1, candidates.tokens, judged).log_softmax(-1)
    return out, _return(opera, state, vote, length, generated)


def _grown(opera: OPERA, step: Step, state: _State) -> Tensor:
    """Products with the row of the newest answer token."""
    if step.max_num_forwards == 1:
        return state.products
    row = opera._weights(step.attention_by_position(0, state.prompt), step.attention[0])[:, state.prompt :]
    return torch.cat([state.products, state.products.new_ones(len(row), 1)], 1) * row


def _return(opera: OPERA, state: _State, vote: Tensor, length: int, generated: int) -> Tensor | None:
    if opera.threshold is None:
        return None
    anchor = int(vote.mode()[0])
    often = (state.votes[0] == anchor).sum(0)  # [k]
    if anchor < 10 or not bool((often > opera.threshold).all()):
        return None
    place = anchor + 1
    if state.tried.get(place, 0) >= opera.tries:
        place -= 1
        if state.tried.get(place, 0) >= opera.tries:
            return None
    state.tried = {**state.tried, place: state.tried.get(place, 0) + 1}
    if length - place > HISTORY:
        place = max(1, length - HISTORY)
    to = min(place, length - 2)
    state.pending = {"place": place, "at": generated, "anchor": anchor}
    return torch.full_like(vote, to)


def on_rollback(state: _State, rollback: Rollback) -> None:
    if "place" not in state.pending:  # another decoder asked
        return
    place, k = state.pending["place"], len(rollback.tokens)
    pairs = list(zip((rollback.parents % k).tolist(), rollback.tokens.tolist(), strict=True))
    rejected = {**state.rejected, place: state.rejected.get(place, []) + pairs}
    rejected.pop(place + 1, None)
    state.rejected = rejected
    state.told = [
        *state.told,
        {
            "at": state.pending["at"],
            "anchor": state.pending["anchor"],
            "kept": int(rollback.num_kept_tokens[0]),
            "place": place,
            "rejected": pairs,
        },
    ]
    state.pending = {"again": place}


@dataclass
class _Held:
    """Ended beams: (score, answer ids, indices), in the order in which they came; open: the beams that go on."""

    ended: list[tuple] = field(default_factory=list)
    open: list[tuple] = field(default_factory=list)
    done: bool = False


class Beams(Hypotheses):
    """Ended beams as transformers 4.29's beam scorer keeps them: lengths count the text prompt, the last of equals
    wins, and what a return
    restores is the very object of the step, so that a second return to it finds what was added since the first."""

    def __init__(self, context: GenerationContext):
        config = context.config
        self.config, self.k = config, config.num_beams
        ids = context.input_ids[0]
        # one place for the image; with embeddings, a dummy first token
        self.prefix = (
            int((~context.visual[0]).sum()) + 1 if len(ids) == context.prompt - context.offset else max(1, len(ids))
        )
        self.prompt_ids, self.eos, self.device = ids, set(context.eos), context.device
        self.held = _Held()

    def update(self, new: BeamContinuations) -> None:
        held, width = self.held, new.lengths[0]
        answer = width - len(self.prompt_ids)  # tokens with the new one
        scores, ids, indices = new.scores[0].tolist(), new.ids[0, :, :width].tolist(), new.indices[0].tolist()
        held.open = []
        for rank, (score, sequence, path) in enumerate(zip(scores, ids, indices, strict=True)):
            tokens = sequence[len(self.prompt_ids) :]
            if tokens[-1] in self.eos:
                if rank < self.k:
                    self._add(held, score, tokens[:-1], path)
            else:
                held.open.append((score, tokens, path))
            if len(held.open) == self.k:
                break
        held.done = held.done or self._is_done(held, max(scores), self.prefix + answer)

    def _add(self, held: _Held, score: float, tokens: list[int], path: list[int]) -> None:
        score = score / (self.prefix + len(tokens)) ** self.config.length_penalty
        if len(held.ended) < self.k or score > min(e[0] for e in held.ended):
            held.ended.append((score, tokens, path))
            if len(held.ended) > self.k:
                worst = min(range(len(held.ended)), key=lambda i: (held.ended[i][0], i))
                del held.ended[worst]

    def _is_done(self, held: _Held, best: float, length: int) -> bool:
        if len(held.ended) < self.k:
            return False
        if self.config.early_stopping is True:
            return True
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.prefix + self.config.max_length - len(self.prompt_ids)
        return min(e[0] for e in held.ended) >= best / length**self.config.length_penalty

    def is_done(self) -> Tensor:
        return torch.tensor([self.held.done], device=self.device)

    def finalize(self, count, sequences):
        held = copy.deepcopy(self.held)
        if not held.done:
            for score, tokens, path in held.open:
                self._add(held, score, tokens, path)
        ranked = sorted(held.ended, key=lambda e: e[0])[::-1][:count]
        longest = min(max(len(e[1]) for e in ranked) + 1, self.config.max_length - len(self.prompt_ids))
        fill = sequences.pad_id if sequences.pad_id >= 0 else 0
        rows = [(e[1] + sorted(self.eos)[:1] if self.eos and len(e[1]) < longest else e[1]) for e in ranked]
        width = max(map(len, rows))
        answers = torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=self.device)
        paths = torch.full((len(rows), width), -1, dtype=torch.int32, device=self.device)
        for i, e in enumerate(ranked):
            path = torch.tensor(e[2][: len(rows[i])], dtype=torch.int32, device=self.device)
            paths[i, : len(path)] = path
        ids = torch.cat([self.prompt_ids.expand(len(rows), -1), answers], 1)
        return ids, torch.tensor([e[0] for e in ranked], device=self.device), paths

    def save(self) -> _Held:
        return copy.deepcopy(self.held)

    def restore(self, saved: list) -> None:
        self.held = saved[0]  # not a copy: the code's own slip
