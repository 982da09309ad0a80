"""The cells of a study: composed from its lines, found in the store, and reported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import hydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from rich.console import Console

from decoders.errors import choices

from ..inputs.errors import InputError
from ..results import Results, code
from ..runner import generate
from ..runner.setup import check, settings, speaker_of, task
from .base import Cell, Report, Study, words


def study_cells(asked: Study, typed: list[str], store: Results, console: Console) -> dict[str, Cell]:
    """The cells of a study, by line, their runs opened in the store; needs Hydra to be initialised with `conf`.

    Raises InputError where what was typed does not fit the study: a task that has not what it measures, or what tells
    cells apart.
    """
    typed = [
        word
        for word in typed
        if word.split("=")[0].split(".")[0] not in ("experiment", "dry_run", "results", "workers", "ray", "logger")
    ]
    loaded, tasks, cells = {}, {}, {}
    for line in asked.lines():
        try:
            conf = hydra.compose("run", words(asked.settings, line, typed))
        except ConfigCompositionException as error:
            raise InputError(
                f"the study's cell '{line}' does not go with what was typed:"
                f" {str(error.__cause__ or error).splitlines()[0]}"
            ) from error
        if conf.image:
            raise InputError(
                "a study scores answers, and nobody can score those on your own pictures; choose a task: task=NAME"
            )
        check(conf)
        key = json.dumps(OmegaConf.to_container(conf.task, resolve=True))
        if key not in tasks:
            tasks[key] = (found := task(conf), found.items())
        for metric in asked.wanted():
            if metric not in tasks[key][0].metrics:
                raise InputError(
                    f"the study '{asked.name}' needs what '{tasks[key][0].title}' does not measure:"
                    f" {choices(metric, tasks[key][0].metrics, 'metric')}"
                )
        plan = generate.plan(conf.decoder)
        cells[line] = Cell(
            line,
            conf,
            *tasks[key],
            store.open(plan.label, settings(conf)),
            [],
            partial(speaker_of, conf, loaded, console),
        )
    return cells


def reported(asked: Study, cells: dict[str, Cell], store: Results, console: Console, folder: Path) -> Report:
    """The report of a study whose cells are in the store, its tables and its plot written into the folder."""
    for cell in cells.values():
        cell.rows = store.rows(cell.run, [item.id for item in cell.items])
    older = {
        version: n for version, n in store.codes(cell.run.id for cell in cells.values()).items() if version != code()
    }
    if older:
        console.print(
            f"answers by other versions of the code than this, {code()}:"
            f" {', '.join(f'{n} by {version}' for version, n in older.items())}",
            style="yellow",
            markup=False,
        )
    folder.mkdir(parents=True, exist_ok=True)
    report = asked.report(cells, folder)
    report.on = (
        f"{', '.join(dict.fromkeys(cell.task.title for cell in cells.values()))}; model"
        f" {', '.join(dict.fromkeys(str(cell.config.model.path) for cell in cells.values()))}{_tuned(cells.values())}"
    )
    for number, sheet in enumerate(report.sheets, 1):
        sheet.write(folder / f"{asked.name}-{number}.csv")
    if report.figure is not None:
        report.figure.savefig(folder / f"{asked.name}.png", dpi=110)
    return report


def _tuned(cells: Iterable[Cell]) -> str:
    """What the options are that the model has settings of its own for, in the cells whose labels do not say it."""
    found: dict[str, dict[str, set[str]]] = {}
    for cell in cells:
        for name, options in (OmegaConf.to_container(cell.config.decoder, resolve=True) or {}).items():
            for key in (cell.config.model.settings or {}).get(name, {}):
                if f"decoder.{name}.{key}=" not in cell.line:
                    found.setdefault(name, {}).setdefault(key, set()).add(str(options[key]))
    return "".join(
        f"; {name} " + " ".join(f"{key}={'|'.join(sorted(values))}" for key, values in options.items())
        for name, options in found.items()
    )
