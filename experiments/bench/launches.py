"""Kernels launched by a decode step, and questions asked of the device: `experiments.bench.decode --launches`.

A dispatch mode counts the operators that would launch a kernel (views do not) in two generations of different lengths,
on a LLaVA of 32 layers of small width; the difference, by step, is the cost of a step whatever the machine. Operators
that a GPU answers only after all before them are counted apart: reads of values (`item`, `tolist`, `bool`), and sizes
that depend on values (`nonzero`, boolean indexing).

A compiled step hides its kernels from such a mode; of it, graphs are counted: how many are made at first, how many more
when the answer is longer, and whether the same answer makes others again.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from rich.markup import escape
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


@dataclass
class Cost:
    """Of a generation or of a step."""

    launches: float = 0
    asks: float = 0


class _Counting(TorchDispatchMode):
    def __init__(self, cost: Cost):
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.cost.launches += not view
        self.cost.asks += func._schema.name.split("::")[1] in _ASKS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted():
    """Within, what is run is counted in the `Cost` yielded."""
    cost, real = Cost(), torch.Tensor.tolist

    def tolist(tensor):
        cost.asks += 1
        return real(tensor)

    with mock.patch.object(torch.Tensor, "tolist", tolist), _Counting(cost):
        yield cost


def of_a_step(generate, model, given: dict, lengths: tuple[int, int] = (8, 24)) -> Cost:
    """The difference of two lengths, by step."""
    found = []
    for tokens in lengths:
        with counted() as cost:
            generate(model, **given, max_new_tokens=tokens)
        found.append(cost)
    steps = lengths[1] - lengths[0]
    return Cost((found[1].launches - found[0].launches) / steps, (found[1].asks - found[0].asks) / steps)


def graphs(stack, model, given: dict, lengths: tuple[int, int, int] = (40, 120, 120)) -> list[int]:
    """Graphs that generations of these lengths make, one after the other, each of which may use those before: of a
    stack that is compiled.
    """
    made = []
    for tokens in lengths:
        stack.generate(model, **given, max_new_tokens=tokens)
        made.append(stack.compiled["graphs"])
    return made


def graphs_table(title: str, found: dict[str, list[int]]) -> Table:
    """What `graphs` counts, by row."""
    out = Table("", "graphs at first", "more for a longer answer", "again", title=title)
    for name, made in found.items():
        out.add_row(escape(name), *map(str, made))
    return out


def table(title: str, found: dict[str, Cost]) -> Table:
    """Costs by row, and against the first row."""
    out = Table("", "launches a step", "ratio", "questions a step", title=title)
    base = next(iter(found.values()))
    for name, cost in found.items():
        ratio = f"{cost.launches / base.launches:.3f}"
        out.add_row(escape(name), f"{cost.launches:.0f}", ratio, f"{cost.asks:.2f}")
    return out
