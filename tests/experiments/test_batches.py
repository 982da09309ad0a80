"""Batches by expected length: other batches, the same answers."""

import io
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from decoders import Stack
from experiments import models
from experiments.inputs.errors import InputError
from experiments.results import Results, digest
from experiments.runner import batches, generate, setup
from experiments.tasks import Scenes
from prunehal import PruneHal

TASK = {"_target_": "experiments.tasks.Scenes", "split": "validation", "form": "typical"}
SEARCHES = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sampling": {"num_beams": 1, "do_sample": True, "top_k": 0},
}
SIZE = 4


@dataclass
class Recording(generate.Speaker):
    """Keeps the ids of every batch that it is given."""

    cut: list[list[str]] = field(default_factory=list)

    def each(self, plan, batches):
        self.cut += [[item.id for item in batch] for batch in batches]
        yield from super().each(plan, batches)


class Stopping(Results):
    """A store whose process is stopped once so many batches are kept."""

    left = 1

    def add(self, run, rows):
        super().add(run, rows)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def config(**other) -> dict:
    return {"model": "m", "task": TASK, "search": SEARCHES["greedy"], "max_new_tokens": 90, "decoder": {}} | other


def rows(**tokens: int) -> list[dict]:
    return [{"image": name, "tokens": n} for name, n in tokens.items()]


@pytest.fixture(scope="module")
def loaded():
    return models.load(models.entry("scenes"))


@pytest.fixture(scope="module")
def items():
    return Scenes("validation", "typical", 0, 12).items()


@pytest.fixture(scope="module")
def plain(loaded, items, tmp_path_factory):
    """The rows of the empty stack, greedily."""
    store = Results(tmp_path_factory.mktemp("plain") / "results.sqlite")
    run = store.open("[]", config())
    speaker = recording(loaded, "greedy")
    generate.describe(speaker, generate.Plan("[]", Stack([])), items, store, run)
    found = store.rows(run, [item.id for item in items])
    ids = [item.id for item in items]
    assert speaker.cut == [ids[:4], ids[4:8], ids[8:]]  # nothing was known
    assert max(row["tokens"] for row in found) > 1.5 * min(row["tokens"] for row in found)
    return found


def recording(loaded, search: str, grouped: bool = True) -> Recording:
    options = SEARCHES[search] | {"max_new_tokens": 90}
    out = Console(file=io.StringIO())
    return Recording(*loaded, "Please describe this image in detail.", options, out, SIZE, group_by_length=grouped)


def answered(loaded, items, plain, search: str, store: Results, grouped: bool = True):
    """The batches and rows of a stack beside the empty one, which is in the store."""
    Results(store.file).add(store.open("[]", config()), plain)
    run = store.open("[prunehal]", config(search=SEARCHES[search], decoder={"prunehal": {}}))
    speaker = recording(loaded, search, grouped)
    try:
        generate.describe(speaker, generate.Plan("[prunehal]", Stack([PruneHal(r=0.9, t=4)])), items, store, run)
    except KeyboardInterrupt:
        assert len(store.done(run)) == SIZE
    return speaker.cut, store.rows(run, [item.id for item in items])


def same(one: list[dict], two: list[dict]) -> None:
    """Rows that say the same, but for the time they took and the last bits of numbers."""
    for a, b in zip(one, two, strict=True):
        assert a.pop("attention") == pytest.approx(b.pop("attention"), abs=2e-6)
        assert a.pop("seconds") > 0 and b.pop("seconds") > 0
        assert a == b


def steps(cut: list[list[str]], found: list[dict]) -> int:
    tokens = {row["image"]: row["tokens"] for row in found}
    return sum(max(tokens[i] for i in batch) for batch in cut)


@pytest.mark.parametrize("search", ["greedy", pytest.param("beam", marks=pytest.mark.slow)])
def test_other_batches_say_the_same_in_fewer_steps_also_when_stopped(loaded, items, plain, tmp_path, search):
    grouped, found = answered(loaded, items, plain, search, Results(tmp_path / "a.sqlite"))
    fixed, as_before = answered(loaded, items, plain, search, Results(tmp_path / "b.sqlite"), grouped=False)
    stopped = Stopping(tmp_path / "c.sqlite")
    first, part = answered(loaded, items, plain, search, stopped)
    rest, whole = answered(loaded, items, plain, search, Results(tmp_path / "c.sqlite"))

    ids = [item.id for item in items]
    assert fixed == [ids[:4], ids[4:8], ids[8:]]
    assert sorted(sum(grouped, [])) == ids and [set(b) for b in grouped] != [set(b) for b in fixed]
    expected = {row["image"]: row["tokens"] for row in plain}
    in_turn = [expected[i] for batch in grouped for i in batch]
    assert in_turn == sorted(in_turn, reverse=True)  # what needs the most memory comes first
    assert steps(grouped, found) < steps(fixed, found)
    assert first == grouped and rest == grouped[1:] and [row["image"] for row in part] == sorted(grouped[0])
    assert [row["image"] for row in found] == ids and any(row["prunes"] for row in found)
    same([dict(row) for row in found], as_before)
    same(found, whole)


def test_samples_are_drawn_in_the_order_of_the_images(loaded, items, plain, tmp_path):
    one, said = answered(loaded, items, plain, "sampling", Results(tmp_path / "a.sqlite"))
    two, as_before = answered(loaded, items, plain, "sampling", Results(tmp_path / "b.sqlite"), grouped=False)
    ids = [item.id for item in items]
    assert one == two == [ids[:4], ids[4:8], ids[8:]]
    same(said, as_before)


def test_what_is_expected_is_the_answer_of_the_run_most_alike(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    for label, tokens, more in (
        ("older", dict(a=1, b=2, c=3, d=4), {"seed": 1}),
        ("alike", dict(a=5, b=6, c=7), {"decoder": {"x": {}}}),
        ("another search", dict(a=8, d=9, e=10), {"search": SEARCHES["beam"]}),
        ("fewer tokens", dict(a=11, f=12), {"max_new_tokens": 20}),
        ("other model", dict(a=13, g=14), {"model": "n"}),
        ("other task", dict(a=15, h=16), {"task": TASK | {"split": "test"}}),
        ("another part", dict(i=17), {"task": TASK | {"start": 5, "count": 2}, "search": SEARCHES["sampling"]}),
        ("itself", dict(a=18, j=19), {}),
    ):
        store.add(store.open(label, config(**more)), rows(**tokens))
    run = store.open("itself", config())
    expected = dict(a=5, b=6, c=7, d=4, e=10, f=12, i=17)
    assert batches.expected_lengths(store, run, "abcdefghijk") == expected
    assert batches.expected_lengths(store, store.open("no task", {"model": "m"}), "abc") == {}


def test_the_median_stands_for_what_nobody_knows():
    lengths = dict(a=1, b=9, c=5, d=5)
    assert batches.longest_first(list("xdaycbz"), lengths) == list("bxdyc" + "z" + "a")


def test_a_run_may_be_continued_in_other_batches(composed):
    here, there, wrong = (composed(f"group_by_length={value}") for value in ("true", "false", "auto"))
    assert digest(setup.settings(here)) == digest(setup.settings(there))
    with pytest.raises(InputError, match="group_by_length is true or false, not 'auto'"):
        setup.check(wrong)
