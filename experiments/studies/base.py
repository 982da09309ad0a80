"""What a study is: cells, each a run of `run.py` by its options, and what is made of their answers."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from omegaconf import DictConfig

from ..inputs.errors import InputError
from ..results import Results, Run, Sheet
from ..runner.generate import Speaker
from ..tasks import Item, Task


@dataclass
class Cell:
    """One cell that has been run.

    line: its options, as on the command line of run.py.
    rows: its answers, one an item, in the order of `items`.
    speaker: makes the model it was run on, for studies that look again.
    """

    line: str
    config: DictConfig
    task: Task
    items: list[Item]
    run: Run
    rows: list[dict]
    speaker: Callable[[], Speaker]

    def lacking(self, store: Results) -> int:
        """How many of its items have no answer in the store."""
        return len({item.id for item in self.items} - store.done(self.run))


@dataclass
class Report:
    """What a study ends in; `on` says what was asked of which model, `pages` are files beside the tables and the
    plot.
    """

    title: str
    sheets: list[Sheet]
    figure: Figure | None = None
    pages: list[Path] = field(default_factory=list)
    on: str = ""


@dataclass
class Study(ABC):
    """A base of studies: dataclasses, one yaml each in `conf/experiment`.

    name: of its files.
    title: what tables are headed with.
    settings: options of run.py for all cells; what is typed on the command line goes before them.
    """

    name: str
    title: str
    settings: list[str]

    @abstractmethod
    def lines(self) -> list[str]:
        """The options of each cell, words apart by spaces; a word with commas stands for several cells, as in a Hydra
        multirun.
        """

    def wanted(self) -> list[str]:
        """Metrics that the task must have."""
        return []

    @abstractmethod
    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        """What the cells, by line, show; files beside the table and the plot go into `folder`."""


def short(line: str) -> str:
    """A cell's line in few words: `decoder=[x] search=beam decoder.x.y=1` is `[x] beam y=1`, and `x.y=1` in a stack of
    several.
    """
    out, words = [], shlex.split(line)
    several = any(word.startswith("decoder=") and "," in word for word in words)
    for word in words:
        key, _, value = word.partition("=")
        _, _, rest = key.partition(".")
        out.append(
            f"{rest if several and key.startswith('decoder.') else rest.rsplit('.', 1)[-1]}={value}" if rest else value
        )
    return " ".join(out)


def expand(lines: Sequence[str]) -> list[str]:
    """Each line without commas that sweep, in order, none twice."""
    out = []
    for line in lines:
        parsed = OverridesParser.create().parse_overrides(shlex.split(line))
        choices = [
            list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.input_line.partition("=")[2]]
            for o in parsed
        ]
        keys = [o.get_key_element() for o in parsed]
        for values in product(*choices):
            out.append(" ".join(f"'{k}={v}'" if " " in v else f"{k}={v}" for k, v in zip(keys, values, strict=False)))
    return list(dict.fromkeys(out))


def words(settings: Sequence[str], line: str, typed: Sequence[str]) -> list[str]:
    """A cell's options: the study's, its own, and what was typed, which goes before the study's; typed options of
    decoders that it has not are left out.

    A task that is typed brings its own options: the study's for its task are left out. Raises InputError for what the
    cell sets to another value itself, since that tells cells apart.
    """
    parser = OverridesParser.create()
    parsed = [[parser.parse_override(word) for word in part] for part in (settings, shlex.split(line), typed)]
    given = [{o.key_or_group: o.input_line for o in part} for part in parsed]
    if "task" in given[2]:
        given[0] = {k: w for k, w in given[0].items() if not k.startswith("task.")}
    for key in given[1].keys() & given[2].keys():
        if given[1][key] != given[2][key]:
            raise InputError(
                f"'{given[2][key]}' does not go with this study, whose cell '{line}' sets {key} itself; leave it out,"
                " or copy the yaml in conf/experiment and change it"
            )
    chosen = given[0] | given[1] | given[2]
    stacks = [o.value() for part in parsed for o in part if o.key_or_group == "decoder"]
    return [w for k, w in chosen.items() if not k.startswith("decoder.") or not stacks or k.split(".")[1] in stacks[-1]]
