"""OPERA (CVPR 2024): an over-trust penalty on candidate tokens, and a return to where over-trust began."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from decoders import (
    Candidates,
    Decoder,
    GenerationContext,
    Hypotheses,
    Requirements,
    Rollback,
    Step,
    persistent,
    write_at,
)
from decoders.options import check_flag, check_integer, check_number
from decoders.tensors import pad_or_crop

from . import opera_official

# answer tokens, the candidate included, during which attention to the image is rewarded; and the first place returned
# to
EARLY = 10
TINY = 1e-7  # factor of the column products in the official code
CEILING = (
    100.0  # largest penalty: decisive among log-probabilities, and small enough to keep their differences in float32
)


@dataclass
class OPERA(Decoder):
    """Penalise candidates after which attention leans on one earlier token; roll back to it when that lasts.

    Each of a row's C best tokens is run. Let w[q, j] = scale * attention of answer token q to answer token j (last
    layer, maximum over heads, renormalised over all keys). With the candidate as the last row, column j has the product
    phi_j = 1e-7 * prod_{q >= j} w[q, j] and the candidate's score is

        s - penalty * max_j phi_j                                  from the 11th answer token on,
        s + penalty * (attention of the candidate to the image)    before.

    Each row votes for the column of its largest product. When all beams of an image have voted more than `threshold`
    times for the column that most of them name now, and it is at least 10, the image goes back to the token after it
    and chooses again, without the choices made there before; if that place has been chosen again `max_rollbacks` times,
    to the one before.
    OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation, eq. 2-6, https://arxiv.org/abs/2311.17911.

    The default is a clean form of the official code, which `faithful` reproduces. It differs in this:

    - It works for batches (every image returns for itself) and under greedy decoding and sampling, where each row
      stands for itself.
    - Column products are kept in float32 logarithms, updated by one row a step, where the code fills a float16 buffer
      that becomes 0 or infinite.
    - Penalties fall on log-probabilities over the whole vocabulary, so that they count between beams; the code
      renormalises over the candidates.
    - Other tokens are impossible, not at -999, below which penalised candidates can sink; penalties stop at 100.
    - Votes move with their beams.
    - After a return the penalty acts as ever, on the best candidates left; the code then chooses from the whole
      vocabulary without a penalty.
    - Choices rejected at a place are forgotten when an earlier place is returned to, and ended beams found since are
      forgotten as well.
    - Ended beams are scored as transformers does, by the answer's length; the code counts the prompt's text as well.

    Args:
        num_candidates: C, candidates a row, >= 1; the tokens that are run before one is picked.
        scale: sigma, > 0.
        threshold: r, votes for one column after which an image goes back, >= 0; None never goes back.
        penalty: alpha, >= 0. With 0, no threshold and at least as many candidates as the search looks at (2 x beams),
            nothing changes.
        max_rollbacks: how often one place is chosen again, >= 0; None: num_candidates, as in the code.
        faithful: reproduce the official code, its quirks included; one image, at least 2 beams.

    Raises:
        StackError: for a value out of range, or `faithful` without beams or with several images.
    """

    num_candidates: int = 5
    scale: float = 50.0
    threshold: int | None = 15
    penalty: float = 1.0
    max_rollbacks: int | None = None
    faithful: bool = False

    def __post_init__(self):
        check_integer(self, "num_candidates", 1)
        check_number(self, "scale", 0, above=True)
        check_integer(self, "threshold", 0, optional=True)
        check_number(self, "penalty", 0)
        check_integer(self, "max_rollbacks", 0, optional=True)
        check_flag(self, "faithful")

    @property
    def tries(self) -> int:
        """How often one place is chosen again."""
        return self.num_candidates if self.max_rollbacks is None else self.max_rollbacks

    def requirements(self, model: Any) -> Requirements:
        return Requirements(
            attention=(-1,),
            head_reduction="max",
            visual=True,
            lookahead=self.num_candidates,
            rollback=self.threshold is not None,
        )

    def init_state(self, context: GenerationContext) -> Any:
        if self.faithful:
            return opera_official.init_state(self, context)
        n = context.rows
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=context.device)
        return _State(
            prompt=context.prompt,
            beams=context.config.num_beams,
            logs=torch.zeros(n, 0, device=context.device),
            votes=zeros(n, 0),
            tried=zeros(n, 0),
            rejected=zeros(n, 0, 3),
            asked=zeros(n, 2),
            returns=zeros(n, 0, 3),
        )

    def make_beam_hypotheses(self, context: GenerationContext) -> Hypotheses | None:
        return opera_official.Beams(context) if self.faithful else None

    def process_logits(self, step: Step, state: Any, scores: Tensor) -> Tensor:
        """Choices made here before a return are not made again. Where nothing else is possible the loop allows them."""
        if self.faithful or not state.rejected.shape[1]:
            return scores
        place, beam, token = state.rejected.unbind(-1)  # [n, e]
        own = torch.arange(len(scores), device=scores.device)[:, None] % state.beams
        now = (place == step.num_forwards[:, None] - 1) & (beam == own) & (token >= 0)
        size = scores.shape[1]
        excluded = scores.new_zeros(len(scores), size + 1).scatter_(1, token.where(now, size), 1.0)[:, :-1] > 0
        return scores.masked_fill(excluded, -torch.inf)

    def rescore_candidates(
        self, step: Step, candidates: Candidates, state: Any, scores: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.faithful:
            return opera_official.rescore_candidates(self, step, candidates, state)
        length, place = step.max_num_forwards, step.num_forwards - 1  # the candidate is answer token `place`
        state.logs = self._grown(step, state)
        attention = candidates.requested("attention")[0]  # [n, c, t]
        weights = self._weights(candidates.attention_by_position(0, state.prompt + length), attention)
        after = weights[..., state.prompt :].log()
        columns = torch.arange(length, device=scores.device)
        logs = pad_or_crop(state.logs, [len(scores), length])[:, None] + after
        logs = logs.masked_fill(columns > place[:, None, None], -torch.inf)
        heaviest, column = logs.max(-1)  # [n, c]
        image = (attention * candidates.requested("visual")[-1][:, None]).sum(-1) / attention.sum(-1)
        trust = (heaviest + math.log(TINY)).exp().clamp(max=CEILING)
        cost = torch.where((place < EARLY)[:, None], -image, trust)
        known = candidates.scores > -torch.inf
        judged = scores.gather(1, candidates.tokens) - self.penalty * cost
        out = torch.full_like(scores, -torch.inf).scatter_(1, candidates.tokens, judged.masked_fill(~known, -torch.inf))
        if self.threshold is None:
            return out, None
        vote = torch.where(known, column, column[:, :1]).mode(-1)[0]
        state.votes = write_at(state.votes, place, vote + 1, length)  # 0: no vote yet
        return out, self._return(step, state, vote)

    def _weights(self, ordered: Tensor, attention: Tensor) -> Tensor:
        """scale * attention, renormalised over all keys since the maximum over heads was taken."""
        return self.scale * ordered / attention.sum(-1, keepdim=True)

    def _grown(self, step: Step, state: _State) -> Tensor:
        """Logarithms of the column products, [n, answer], with the row of the newest answer token."""
        if step.max_num_forwards == 1:
            return state.logs
        row = self._weights(step.attention_by_position(0, state.prompt), step.attention[0])[:, state.prompt :].log()
        columns = torch.arange(row.shape[1], device=row.device)
        return pad_or_crop(state.logs, list(row.shape)) + row.masked_fill(
            columns >= step.num_forwards[:, None] - 1, 0.0
        )

    def _return(self, step: Step, state: _State, vote: Tensor) -> Tensor:
        """long [n]: answer tokens that are kept of images that go back, -1 for the others."""
        place, limit = step.num_forwards - 1, math.inf if self.threshold is None else self.threshold
        anchor = rearrange(vote, "(b k) -> b k", k=step.beams).mode(-1)[0].repeat_interleave(step.beams)
        cast = torch.arange(state.votes.shape[1], device=vote.device) <= place[:, None]
        often = ((state.votes == anchor[:, None] + 1) & cast).sum(-1) > limit
        often = rearrange(often, "(b k) -> b k", k=step.beams).all(-1).repeat_interleave(step.beams)
        state.tried = pad_or_crop(state.tried, [len(vote), max(step.max_num_forwards + 1, state.tried.shape[1])])
        spent = lambda p: state.tried.gather(1, p[:, None])[:, 0] >= self.tries  # noqa: E731
        to = torch.where(spent(anchor + 1), anchor, anchor + 1)
        goes = often & (anchor >= EARLY) & (to < place) & ~spent(to) & step.unfinished
        state.asked = torch.stack([place, anchor], 1)
        return torch.where(goes, to, -1)

    def on_rollback(self, state: Any, rollback: Rollback) -> None:
        if self.faithful:
            return opera_official.on_rollback(state, rollback)
        if not state.tried.shape[1]:  # it never asked: another decoder did, or these are rows of a branch
            return None
        rows, place = rollback.rows[:, None], rollback.num_kept_tokens.clamp(min=0)
        tried = state.tried.gather(1, place[:, None]) + 1
        state.tried = torch.where(rows, state.tried.scatter(1, place[:, None], tried), state.tried)
        # what was rejected at later places belongs to an answer that is no more
        later = (state.rejected[..., 0] > place[:, None]) & rows
        kept = state.rejected.masked_fill(later[..., None], -1)
        picks = torch.stack([rollback.parents % state.beams, rollback.tokens], -1)
        picks = repeat(rearrange(picks, "(b k) x -> b k x", k=state.beams), "b k x -> (b j) k x", j=state.beams)
        new = torch.cat([place[:, None, None].expand(-1, state.beams, 1), picks], -1).masked_fill(~rows[..., None], -1)
        state.rejected = torch.cat([kept, new], 1)
        told = torch.cat([state.asked, place[:, None]], 1).masked_fill(~rows, -1)
        state.returns = torch.cat([state.returns, told[:, None]], 1)

    def record(self, state: Any) -> list[dict]:
        """Per row `rollbacks`: each with the tokens generated `at` the time, the `anchor` (the column leant on) and the
        tokens `kept`.
        """
        return [
            {"rollbacks": [{"at": a, "anchor": b, "kept": c} for a, b, c in row if c > 0]}
            for row in state.returns.tolist()
        ]


@dataclass
class _State:
    """logs: logarithms of the column products, [n, answer]; votes: column + 1 that each step voted for, [n, answer].
    What outlasts a return:
    tried: how often a place was chosen again, [n, answer]; rejected: [n, e, (place, beam, token)], -1 where forgotten;
    asked: the newest [n, (length, anchor)]; returns: [n, r, (length, anchor, kept)], -1 for returns of other images."""

    prompt: int
    beams: int
    logs: Tensor
    votes: Tensor
    tried: Tensor = persistent()
    rejected: Tensor = persistent()
    asked: Tensor = persistent()
    returns: Tensor = persistent()
