"""Do the tests notice a decoder that does nothing? `make mutants`.

Every hook that a decoder of `prunehal` and `baselines` overrides is in turn replaced by the one of `Decoder`, which
does nothing. The tests of that decoder and those of composition then run until one fails. So are, by wrong ones, those
functions by which hooks inside the forward find the slots and the images that they speak of. A mutant that no test
notices survives, and the exit status is 1. Everything is imported once; each mutant is a process forked from there.

    python tests/mutants.py [--cut] [--jobs N] [WORD ...]

`--cut` takes, of hooks, only those that change an answer, and leaves out the traces of official codes. With words, only
mutants whose name holds one of them.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.chdir(ROOT)

import conftest  # noqa: F401  -- few threads: those that run already do not survive a fork
import pytest
import stacks  # noqa: F401  -- imported here, so that no mutant has to
import torch
from rich.console import Console
from rich.table import Table

from baselines import fastv
from decoders import AttentionView, Decoder, ForwardView
from decoders.inside import Inside
from decoders.mirror import Mirror

PACKAGES = ("prunehal", "baselines")
COMPOSITION = "tests/decoders/test_composition.py"
HOOKS = sorted(name for name, value in vars(Decoder).items() if inspect.isfunction(value))
ANSWERS = (
    "process_logits",
    "rescore_candidates",
    "wants_to_prune",
    "select_slots",
    "select_slots_after_prefill",
    "attention_bias",
    "edit_attention",
    "edit_hidden_states",
    "edit_mlp",
    "encoding_context",
)


class Mutant(NamedTuple):
    """`new` in the place of what a class or a module has by a name, and the files that are to notice it."""

    owner: Any
    name: str
    new: Callable
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.owner.__name__.split('.')[-1]}.{self.name}"


def of_another_image(known: Callable) -> Callable:
    """`ForwardView.image` that gives each row what is known of the image of the next."""

    def image(view: ForwardView, name: str) -> torch.Tensor | None:
        value = known(view, name)
        return None if value is None else value.roll(1, 0)

    return image


def by_place(visual: torch.Tensor) -> torch.Tensor:
    """In place of the ordinals of visual tokens among themselves, their places in the prompt."""
    places = torch.arange(visual.shape[-1]).expand_as(visual)
    return places.masked_fill(~visual, visual.shape[-1])


def wrong_places() -> list[Mutant]:
    """Hooks inside the forward that hide nothing, or whose slots, branches' slots, images or seeds are others."""
    methods = tuple(f"tests/baselines/test_{name}.py" for name in ("fastv", "sid", "avisc", "icd", "vista"))
    files = (*methods, COMPOSITION)
    return [
        Mutant(AttentionView, "hide", lambda view, slots: None, files),
        Mutant(Inside, "by_place", lambda inside, slots, layer, branch: slots, files),
        Mutant(Mirror, "same_layout", lambda mirror, branch: True, files),  # the same slots in any prompt
        Mutant(fastv, "_ordinal", by_place, files),
        Mutant(ForwardView, "image", of_another_image(ForwardView.image), files),
        Mutant(ForwardView, "seeds", property(lambda view: [view._inside.seeds[0]] * len(view.real)), files),
    ]


def decoders() -> list[type]:
    """All decoders of the two packages, by where they are defined."""
    found = {}
    for package in PACKAGES:
        for module in pkgutil.iter_modules([str(ROOT / package)], package + "."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and issubclass(value, Decoder) and value.__module__ == module.name:
                    found[value.__qualname__] = value
    return list(found.values())


def mutants(cut: bool) -> list[Mutant]:
    """Every class and hook that it overrides, and wrong places."""
    hooks = ANSWERS if cut else HOOKS
    nothing = [
        Mutant(cls, hook, getattr(Decoder, hook), tests(cls))
        for cls in decoders()
        for hook in hooks
        if hook in vars(cls)
    ]
    return nothing + wrong_places()


def tests(cls: type) -> tuple[str, ...]:
    """The files that are to notice a mutant of the class: that of its module, if there is one, and composition's."""
    package, module = cls.__module__.split(".")
    names = [f"tests/{package}/test_{module}.py", f"tests/{package}/test_{module.split('_')[0]}.py"]
    own = [name for name in names if (ROOT / name).exists()]
    return (*own[:1], COMPOSITION)


def run(mutant: Mutant, report: str, cut: bool) -> int:
    """In a forked process: replace what it names, and run tests up to the first that fails. pytest's exit status."""
    words = ["-k", "not official_trace"] if cut else []
    if not hasattr(mutant.owner, mutant.name):
        raise AttributeError(f"{mutant}: there is nothing of that name")
    setattr(mutant.owner, mutant.name, mutant.new)
    with open(report, "w") as out, redirect_stdout(out), redirect_stderr(io.StringIO()):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *words, *mutant.tests]))


def forked(mutant: Mutant, report: str, cut: bool) -> int:
    """The id of a process that runs a mutant."""
    if process := os.fork():
        return process
    code = 3  # also where what is to be replaced is no longer there
    try:
        code = run(mutant, report, cut)
    finally:
        os._exit(code)


def noticed(report: str) -> str:
    """The test that failed first."""
    lines = [line for line in Path(report).read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" ")[1].split("::")[-1] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutants.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants whose name holds one, as OPERA.record")
    parser.add_argument("--cut", action="store_true", help="only the hooks that change an answer")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time; default: %(default)s")
    args = parser.parse_args()
    chosen = [
        mutant
        for mutant in mutants(args.cut)
        if not args.words or any(word.lower() in str(mutant).lower() for word in args.words)
    ]
    if not chosen:
        parser.error("no mutant has such a name; there are " + ", ".join(map(str, mutants(False))))
    waiting, running, results = list(enumerate(chosen)), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                number, mutant = waiting.pop(0)
                report = f"{folder}/{number}"
                running[forked(mutant, report, args.cut)] = (number, report, time.monotonic())
            process, status = os.wait()
            number, report, began = running.pop(process)
            code = os.waitstatus_to_exitcode(status)
            fate = {1: "killed", 0: "SURVIVED"}.get(code, f"BROKEN (exit status {code})")
            results[number] = (str(chosen[number]), fate, noticed(report), f"{time.monotonic() - began:.0f}")
            print(f"{len(results)}/{len(chosen)} {results[number][0]}: {fate}", file=sys.stderr, flush=True)
    table = Table("mutant", "fate", "noticed first by", "s")
    for number in sorted(results):
        table.add_row(*results[number])
    Console(width=140).print(table)
    alive = [row[0] for row in results.values() if row[1] != "killed"]
    print(
        f"{len(results) - len(alive)} of {len(results)} mutants killed"
        + (f"; not: {', '.join(alive)}" if alive else "")
    )
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
