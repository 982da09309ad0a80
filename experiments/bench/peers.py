"""Other libraries whose methods are timed beside ours: `experiments.bench.decode --peer NAME`, where one is installed.

They run in this process, on the same model and inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor


class MissingPeerError(Exception):
    """A peer that is not installed; says how to install it."""


class _Given:
    """What mitigv takes for a processor: it hands over inputs that are ready, and token ids for text."""

    def __init__(self, given: Mapping[str, Tensor]):
        self.given = given

    def __call__(self, **_) -> Mapping[str, Tensor]:
        return self.given

    def batch_decode(self, sequences: Tensor, **_) -> list[Tensor]:
        return list(sequences)


def _mitigv(method: str, model, max_new_tokens: int, do_sample: bool = False, num_beams: int = 1, **given) -> Tensor:
    """long [b, prompt + new]: one generation by a method of mitigv, at its own defaults."""
    peer = _installed("mitigv")
    options = dict(max_new_tokens=max_new_tokens, do_sample=do_sample, num_beams=num_beams)
    answers = peer.build_mitigator(method, model=model, processor=_Given(given), **options).generate(None, "")
    answers = torch.stack(answers) if isinstance(answers, list) else answers[None]
    return torch.cat([given["input_ids"], answers], 1)


def mitigv(search: str) -> dict[str, Callable]:
    """The methods that mitigv has as well, under this search, by the name of their row.

    Raises:
        MissingPeerError: where it is not installed.
    """
    _installed("mitigv")
    methods = ("vcd", "opera") if search == "beam" else ("vcd",)
    return {f"mitigv {method}": partial(_mitigv, method) for method in methods}


PEERS: dict[str, Callable[[str], dict[str, Callable]]] = {"mitigv": mitigv}


def _installed(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPeerError(f"{name} is not installed: pip install {name}") from error
