"""A decoder of another package: answers begin with one token, said again and again."""

from dataclasses import dataclass

import torch

from decoders import Decoder, Run, StackError, Step


@dataclass
class Shout(Decoder):
    """Says `token` `times` times at the beginning of every answer.

    Raises:
        StackError: if the model has no such token.
    """

    token: int = 5
    times: int = 2

    def start(self, run: Run) -> None:
        if not 0 <= self.token < run.model.config.get_text_config().vocab_size:
            raise StackError(f"shout: the model has no token {self.token}")

    def score(self, step: Step, state: None, scores: torch.Tensor) -> torch.Tensor:
        loud = torch.full_like(scores, -torch.inf)
        loud[:, self.token] = 0
        return torch.where((step.number <= self.times)[:, None], loud, scores)
