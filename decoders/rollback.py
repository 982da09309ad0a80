"""Going back: what is remembered of every place that images may return to, and how they return.

Keys and values are still in the pool; a checkpoint holds what rows saw there, and the small states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .kv_pool import SavedSlots
from .runner import ModelRunner
from .search import Selection
from .states import DecoderStates, SavedStates
from .tensors import pad_slots
from .views import Rollback


@dataclass
class Checkpoint:
    """Everything as it was when rows stood before a choice.

    Attributes:
        states: of the decoders.
        search: what was generated, and the finished beams.
        slots: what each row saw, and finished beams, by table of slots.
    """

    states: SavedStates
    search: Any
    slots: list[SavedSlots]


class History:
    """Checkpoints and choices of each group of rows that go back together (the beams of an image, or one row), by the
    number of tokens that it had generated.

    Args:
        groups: how many there are.
        size: rows a group.
    """

    def __init__(self, groups: int, size: int):
        self.size = size
        self.checkpoints: list[dict[int, Checkpoint]] = [{} for _ in range(groups)]
        self.choices: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(groups)]

    def every(self) -> list[Checkpoint]:
        """Each checkpoint once; groups share those that were made together."""
        return list({id(point): point for group in self.checkpoints for point in group.values()}.values())

    def slots(self, table: int) -> list[SavedSlots]:
        """What every checkpoint remembers of a table."""
        return [point.slots[table] for point in self.every()]

    def save(self, generated: list[int], states: DecoderStates, search, runner) -> None:
        """Remember everything as it is now, for groups that stand here for the first time."""
        new = [g for g, count in enumerate(generated) if count not in self.checkpoints[g]]
        if new:
            point = Checkpoint(states.save(), search.save(), runner.save_slots())
            for g in new:
                self.checkpoints[g][generated[g]] = point

    def add_choice(self, generated: list[int], selection: Selection) -> None:
        """Remember what was picked, for decoders that later go back to before it."""
        rows = selection.rows()
        for g, count in enumerate(generated):
            mine = slice(g * self.size, (g + 1) * self.size)
            self.choices[g][count] = rows[mine], selection.tokens[mine]

    def roll_back(self, targets: list[int], generated: list[int], states: DecoderStates, search, runner) -> Rollback:
        """Each group returns to where it had generated `targets[g]` tokens; -1 to `generated[g]`, where it stood before
        this step. The newest token of each row is then to be run again.
        """
        points = [self.checkpoints[g][t if t > 0 else generated[g]] for g, t in enumerate(targets)]
        rows = lambda values: search.sequences.expand_to_rows(values)  # noqa: E731
        for point in {id(point): point for point in points}.values():
            flags = [point is one for one in points]
            states.restore(point.states, None if all(flags) else rows(flags).bool())
        search.restore([point.search for point in points])
        restore_slots(runner, [point.slots for point in points], self.size)
        none = torch.full((self.size,), -1, device=search.sequences.ids.device)
        choices = [self.choices[g].get(t) for g, t in enumerate(targets)]
        parents, tokens = (torch.cat([none if one is None else one[i] for one in choices]) for i in (0, 1))
        for g, t in enumerate(targets):
            if t > 0:
                self.checkpoints[g] = {at: point for at, point in self.checkpoints[g].items() if at <= t}
                self.choices[g] = {at: choice for at, choice in self.choices[g].items() if at < t}
        return Rollback(rows([t > 0 for t in targets]).bool(), rows(targets), parents, tokens)


def restore_slots(runner: ModelRunner, saved: list[list[SavedSlots]], size: int) -> None:
    """Rows of group g, `size` rows, see what they saw in `saved[g]`, by table."""
    for i, table in enumerate(runner.tables):
        merge = lambda parts, table=table: _merge(parts, size, runner.ways, runner.k, table.capacity)  # noqa: E731
        table.visible = merge([one[i].visible for one in saved])
        finished = [one[i].finished for one in saved]
        known = [one[i].visible if x is None else x for one, x in zip(saved, finished, strict=True)]
        table.finished = None if all(x is None for x in finished) else merge(known)


def _merge(saved: list[Tensor], size: int, ways: int, k: int, capacity: int) -> Tensor:
    """bool [L or 1, s, k, capacity] whose rows of group g are those of `saved[g]`."""
    rows = [rearrange(pad_slots(x, capacity), "l (w b) k t -> l w (b k) t", w=ways) for x in saved]
    layers = max(map(len, rows))
    mine = [x.expand(layers, -1, -1, -1)[:, :, g * size : (g + 1) * size] for g, x in enumerate(rows)]
    return rearrange(torch.cat(mine, 2), "l w (b k) t -> l (w b) k t", k=k)
