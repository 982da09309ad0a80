"""A decoder of another package: answers begin with one token, said again and again."""

from dataclasses import dataclass
from typing import Any

import torch

from prunehal import Decoder, Requirements, StackError, Step


@dataclass
class Shout(Decoder):
    """Says `token` `times` times at the beginning of every answer.

    Raises:
        StackError: for values that it cannot have, and if the model has no such token.
    """

    token: int = 5
    times: int = 2

    def __post_init__(self):
        for name, least in (("token", 0), ("times", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise StackError(f"shout: {name} is an integer >= {least}, not {getattr(self, name)!r}")

    def requirements(self, model: Any) -> Requirements:
        """Nothing; what the model lacks is said here, before anything has run."""
        if self.token >= model.config.get_text_config().vocab_size:
            raise StackError(f"shout: the model has no token {self.token}")
        return Requirements()

    def process_logits(self, step: Step, state: None, scores: torch.Tensor) -> torch.Tensor:
        loud = torch.full_like(scores, -torch.inf)
        loud[:, self.token] = 0
        return torch.where((step.num_forwards <= self.times)[:, None], loud, scores)
