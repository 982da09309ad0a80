"""How the images of a run are put into batches.

A batch runs until its longest answer ends. Answers of one model to one image are of similar length whatever the stack,
so the store knows beforehand, once one stack has answered, which images go well together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from ..results import Results, Run, same_task
from ..tasks import Item


def expected_lengths(store: Results, run: Run, ids: Sequence[str]) -> dict[str, int]:
    """How many tokens each answer of a run is expected to have: as many as the answer that another run has to the same
    item, prompt and model.

    A run of the same search goes before others, then one of the same `max_new_tokens`, then a newer one. The run's own
    answers do not count, so that a run that was stopped goes on with the batches it would have had.

    Args:
        ids: of the items.

    Returns:
        Tokens by id; an item that no other run has answered is not in it.
    """
    model, alike = run.config.get("model"), ("search", "max_new_tokens")
    others = [
        other
        for other in reversed(store.runs())
        if other.id != run.id and other.config.get("model") == model and "task" in run.config and same_task(other, run)
    ]
    others.sort(key=lambda other: [other.config.get(key) != run.config.get(key) for key in alike])
    found: dict[str, int] = {}
    for other in others:
        lacking = [i for i in ids if i not in found]
        if not lacking:
            break
        found |= {row["image"]: row["tokens"] for row in store.rows(other, lacking) if row.get("tokens")}
    return found


def longest_first(ids: Sequence[str], lengths: Mapping[str, int]) -> list[str]:
    """Ids by expected length, the longest first, so that a batch that is too large for the device's memory is met
    early; those of equal length in their order.

    Args:
        lengths: tokens by id, of one item or more; the median stands for an id that is not in it.
    """
    middle = median(lengths.values())
    return sorted(ids, key=lambda i: -lengths.get(i, middle))


def cut(
    items: Sequence[Item], size: int, done: Collection[str], lengths: Mapping[str, int], whole: bool
) -> list[tuple[list[Item], int]]:
    """Batches of the items that are not done, each with how many of it are not.

    Without lengths, batches are cut from all items in their order, whatever is done. With them, from those that are not
    done, the longest first. Either way, a run of which some batches are done goes on with the others (but that items
    whose pictures could not be read are tried again).

    Args:
        size: items in a batch, at most.
        done: ids of the items that have answers.
        lengths: expected tokens by id; empty: keep the order of the items.
        whole: a batch that lacks one is answered as a whole, as under sampling, where its rows draw together.
    """
    if lengths:
        known = {item.id: item for item in items}
        items = [known[i] for i in longest_first(list(known), lengths) if i not in done]
    groups = [list(items[at : at + size]) for at in range(0, len(items), size)]
    lacks = [[item for item in group if item.id not in done] for group in groups]
    return [(group if whole else lack, len(lack)) for group, lack in zip(groups, lacks, strict=True) if lack]
