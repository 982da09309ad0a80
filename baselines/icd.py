"""ICD (Findings of ACL 2024): contrast the prompt with one whose instruction disturbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from decoders import Branch, Decoder, RawInputs, Requirements, StackError, Step
from decoders.options import check_number, is_integer

from .contrast import contrast, plausible


@dataclass
class ICD(Decoder):
    """Contrast with a branch whose prompt has a disturbing instruction.

    A branch runs on the same pictures and a prompt with a disturbing instruction. With scores l and its scores d,

        (1 + alpha) l - alpha d,   and impossible where l < log(beta) + max l.

    Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding,
    https://arxiv.org/abs/2403.18715. Published: alpha 1, beta 0.1 for all models, and five instructions, none of them
    the default; with LLaVA they replace the system sentence (`branch_input_ids` can). Here the instruction stands right
    after the last picture, as in a later implementation, whose default this is; "You are a confused image caption
    model." is its other one. A Q-Former that reads the question (InstructBLIP) reads the instruction in its place, as
    published, while the language model's prompt stays the same.

    The official code acts under sampling only; here the search is free, and the constraint holds in greedy search, too.
    A pruner drops the k-th visual token of the branch where it drops the k-th of the main rows. Costs a branch as long
    as the prompt (rows twice); none with `alpha` 0, the constraint alone.

    Args:
        alpha: weight of the contrast, >= 0; 0 for none.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay.
        instruction: the text; `stack.generate` needs `tokenizer=` for it, with a Q-Former the processor, which has two.
        insert_ids: token ids in place of the text.
        branch_input_ids: whole prompts in place of both, ids without padding, a row an image; they hold as many image
            tokens as the main ones.

    Raises:
        StackError: for a value out of range, prompts without image tokens, and text without a tokenizer.
    """

    alpha: float = 1.0
    beta: float = 0.1
    instruction: str = "You are a confused object detector."
    insert_ids: Sequence[int] | None = None
    branch_input_ids: Sequence[Sequence[int]] | Tensor | None = None

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "beta", 0, 1)
        if not isinstance(self.instruction, str) or not self.instruction.strip():
            raise StackError(f"icd: instruction is a text, not {self.instruction!r}")
        if self.insert_ids is not None and not _is_ids(self.insert_ids):
            raise StackError(f"icd: insert_ids are token ids or none, not {self.insert_ids!r}")
        if isinstance(rows := self.branch_input_ids, Tensor):
            rows = rows.tolist()
        if rows is not None and not (isinstance(rows, Sequence) and rows and all(map(_is_ids, rows))):
            raise StackError(f"icd: branch_input_ids are lists of token ids, one an image, or none, not {rows!r}")

    def requirements(self, model: Any) -> Requirements:
        if not self.alpha:
            return Requirements()
        # with visual tokens, by which the branch is pruned as the main rows are
        return Requirements(visual=True, branch=Branch(inputs=self.disturbed))

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        changed = contrast(scores, step.branch, self.alpha) if self.alpha else scores
        return plausible(scores, changed, self.beta)

    def disturbed(self, given: RawInputs) -> dict[str, Any]:
        """The entries of the inputs that differ in the branch."""
        if self.branch_input_ids is not None:
            rows = self.branch_input_ids
            return given.with_prompts(rows.tolist() if isinstance(rows, Tensor) else rows)
        qformer = given.has_qformer
        ids = given.token_ids(self.instruction, qformer) if self.insert_ids is None else list(self.insert_ids)
        return given.with_qformer_tokens(ids) if qformer else given.with_tokens(ids)


def _is_ids(ids: Any) -> bool:
    return (
        isinstance(ids, Sequence)
        and not isinstance(ids, str)
        and len(ids) > 0
        and all(is_integer(i) and i >= 0 for i in ids)
    )
