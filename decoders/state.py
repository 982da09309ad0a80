"""Rows of anything: how the loop reorders, saves and restores the row-first tensors of states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import StackError


def put(buffer: Tensor, at: Tensor, value: Tensor, width: int) -> Tensor:
    """A copy of `buffer`, [n, s, ...], at least `width` long (zeros), with `value`, [n, ...], at place `at`, long [n]
    and less than `width`, of each row.
    """
    rows, short = torch.arange(len(buffer), device=buffer.device), width - buffer.shape[1]
    out = (
        torch.cat([buffer, buffer.new_zeros(len(buffer), short, *buffer.shape[2:])], 1) if short > 0 else buffer.clone()
    )
    out[rows, at] = value.to(out.dtype)
    return out


def each(state: Any, change: Callable, *others: Any, lasting: bool = True) -> Any:
    """`state` with `change(tensor, *tensors of others)` for every tensor; containers are new, tensors may be shared.

    Without `lasting`, fields marked so stay as they are.
    """
    if isinstance(state, Tensor):
        return change(state, *others)
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        new = {}
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            skip = field.metadata.get("lasting") and not lasting
            new[field.name] = (
                value if skip else each(value, change, *(getattr(o, field.name) for o in others), lasting=lasting)
            )
        return dataclasses.replace(state, **new)
    if isinstance(state, dict):
        return {k: each(v, change, *(o.get(k) for o in others), lasting=lasting) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        if any(len(o) != len(state) for o in others):
            raise StackError(
                "a list in a state changed its length, which a rollback cannot undo row by row; use a tensor and"
                " decoders.put"
            )
        return type(state)(each(v, change, *(o[i] for o in others), lasting=lasting) for i, v in enumerate(state))
    return state


def index(state: Any, rows: Tensor, count: int, who: str) -> Any:
    """The state whose row i is row `rows[i]` of this one, which has `count` rows."""

    def pick(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != count:
            raise StackError(f"{who}: tensors of a state are row-first, [{count}, ...]; one is {list(tensor.shape)}")
        return tensor[rows.to(tensor.device)]

    return each(state, pick)


class Saved:
    """A state as it was. Its tensors are shared, so what is saved must not be written into; that is checked."""

    def __init__(self, state: Any, who: str):
        self.state, self.who = each(state, lambda t: t), who
        self._versions: list[tuple[Tensor, int]] = []
        each(state, lambda t: self._versions.append((t, t._version)))

    def back(self, now: Any, rows: Tensor | None) -> Any:
        """`now` with the rows, bool [n] (None: all), as they were when saved; `lasting` fields stay."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise StackError(
                f"{self.who}: a hook wrote into a tensor of its state; hooks replace tensors, so that a rollback finds"
                " the old ones"
            )

        def restore(new: Tensor, old: Tensor) -> Tensor:
            if new is old or rows is None:
                return old
            shape = [len(new)] + [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:], strict=True)]
            return torch.where(rows.to(new.device).view(-1, *[1] * (new.ndim - 1)), fit(old, shape), fit(new, shape))

        return each(now, restore, self.state, lasting=False)


def fit(tensor: Tensor, shape: list[int], fill: int = 0) -> Tensor:
    """Filled up, or cut, at the ends of its dimensions to `shape`."""
    if list(tensor.shape) == shape:
        return tensor
    out = tensor.new_full(shape, fill)
    both = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    out[both] = tensor[both]
    return out


def left_pad(tensor: Tensor, length: int, dim: int = -1, fill: int = 0) -> Tensor:
    """Padded on the left of `dim` to `length`."""
    short = length - tensor.shape[dim]
    if short <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor.new_full(shape, fill), tensor], dim)
