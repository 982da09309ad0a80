"""The states of the decoders: how the loop reorders, saves and restores their row-first tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import StackError
from .tensors import pad_or_crop


def tree_map(state: Any, change: Callable, *others: Any, persistent: bool = True) -> Any:
    """`state` with `change(tensor, *tensors of others)` for every tensor; containers are new, tensors may be shared.

    Without `persistent`, fields marked so stay as they are.
    """
    if isinstance(state, Tensor):
        return change(state, *others)
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        new = {}
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            skip = field.metadata.get("persistent") and not persistent
            theirs = (getattr(other, field.name) for other in others)
            new[field.name] = value if skip else tree_map(value, change, *theirs, persistent=persistent)
        return dataclasses.replace(state, **new)
    if isinstance(state, dict):
        if any(other.keys() != state.keys() for other in others):
            raise StackError("a dict in a state changed its keys, which a rollback cannot undo row by row")
        return {
            k: tree_map(v, change, *(other[k] for other in others), persistent=persistent) for k, v in state.items()
        }
    if isinstance(state, (list, tuple)):
        if hasattr(state, "_fields"):
            raise StackError("a state holds a named tuple; use a dataclass")
        if any(len(other) != len(state) for other in others):
            raise StackError(
                "a list in a state changed its length, which a rollback cannot undo row by row; use a tensor and"
                " decoders.write_at"
            )
        return type(state)(
            tree_map(v, change, *(other[i] for other in others), persistent=persistent) for i, v in enumerate(state)
        )
    if any(other is not state and other != state for other in others):
        raise StackError(
            f"a state holds {type(state).__name__}s that changed, which a rollback cannot undo row by row; use tensors,"
            " row-first, or a persistent field"
        )
    return state


def select_rows(state: Any, rows: Tensor, count: int, owner: str) -> Any:
    """The state whose row i is row `rows[i]` of this one, which has `count` rows and belongs to the decoder `owner`."""

    def select(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != count:
            raise StackError(f"{owner}: tensors of a state are row-first, [{count}, ...]; one is {list(tensor.shape)}")
        return tensor[rows.to(tensor.device)]

    return tree_map(state, select)


class StateSnapshot:
    """A state as it was. Its tensors are shared, so what is saved must not be written into; that is checked."""

    def __init__(self, state: Any, owner: str):
        self.state, self.owner = tree_map(state, lambda t: t), owner
        self._versions: list[tuple[Tensor, int]] = []
        # tensors of inference mode count no versions
        tree_map(state, lambda t: None if t.is_inference() else self._versions.append((t, t._version)))

    def restore(self, now: Any, rows: Tensor | None) -> Any:
        """`now` with the rows, bool [n] (None: all), as they were when saved; `persistent` fields stay."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise StackError(
                f"{self.owner}: a hook wrote into a tensor of its state; hooks replace tensors, so that a rollback"
                " finds the old ones"
            )

        def merge(new: Tensor, old: Tensor) -> Tensor:
            if new is old or rows is None:
                return old
            shape = [len(new)] + [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:], strict=True)]
            mine = rows.to(new.device).view(-1, *[1] * (new.ndim - 1))
            return torch.where(mine, pad_or_crop(old, shape), pad_or_crop(new, shape))

        return tree_map(now, merge, self.state, persistent=False)


@dataclass
class DecoderStates:
    """What `init_state` made, as it stands now.

    Attributes:
        owners: names of the decoders.
        main: a state by decoder, of the main rows.
        branches: the same for each branch that prunes for itself; empty for the others.
        finished: the same for rows that ended, under beam search, where they were among the best.
    """

    owners: list[str]
    main: list[Any]
    branches: list[list[Any]]
    finished: list[Any]

    def select(self, rows: Tensor, count: int) -> None:
        """Row i becomes row `rows[i]` of the `count` there are."""
        self.main = [select_rows(s, rows, count, who) for who, s in zip(self.owners, self.main, strict=True)]
        self.branches = [
            [select_rows(s, rows, count, who) for who, s in zip(self.owners, states, strict=False)]
            for states in self.branches
        ]

    def finish(self, rows: Tensor, ended: list[Any]) -> None:
        """Keep the states, `ended` by decoder, of rows that end beside those of rows that ended before: rows >= n stand
        for the latter.
        """
        n = len(rows)

        def select(new: Tensor, old: Tensor) -> Tensor:
            shape = [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:], strict=True)]
            return torch.cat([pad_or_crop(new, [n, *shape]), pad_or_crop(old, [n, *shape])])[rows.to(new.device)]

        self.finished = [tree_map(now, select, old) for now, old in zip(ended, self.finished, strict=True)]

    def save(self) -> SavedStates:
        """What `restore` needs."""
        save = lambda states: [StateSnapshot(s, who) for s, who in zip(states, self.owners, strict=False)]  # noqa: E731
        return SavedStates(save(self.main), [save(states) for states in self.branches], save(self.finished))

    def restore(self, saved: SavedStates, rows: Tensor | None) -> None:
        """The rows, bool [n] (None: all), as they were when saved."""
        back = lambda old, now: [s.restore(n, rows) for s, n in zip(old, now, strict=True)]  # noqa: E731
        self.main = back(saved.main, self.main)
        self.branches = [back(*pair) for pair in zip(saved.branches, self.branches, strict=True)]
        self.finished = back(saved.finished, self.finished)


@dataclass
class SavedStates:
    """Snapshots in the order of `DecoderStates`."""

    main: list[StateSnapshot]
    branches: list[list[StateSnapshot]]
    finished: list[StateSnapshot]
