"""A study: many runs, what lacks is answered, and a report."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from ..inputs.errors import InputError
from ..integrations import loggers
from ..results import Results
from ..runner import generate, workers
from ..runner.setup import check, speaker
from ..studies.base import Cell, Study
from ..studies.cells import reported, study_cells
from . import display


def study(cfg: DictConfig, folder: Path, typed: list[str]) -> int:
    """Run every cell of a study that is not in the store yet, then show and write what they say; returns 1 if pictures
    could not be read.
    """
    _check(cfg)
    console, asked, store = Console(), instantiate(cfg.experiment), Results(cfg.results)
    cells = study_cells(asked, typed, store, console)
    lacking = {line: cell.lacking(store) for line, cell in cells.items()}
    if cfg.dry_run:
        for line, n in lacking.items():
            console.print(Text(f"{n:6} of {len(cells[line].items)} to do: {line}"), soft_wrap=True)
        console.print(
            f"{sum(lacking.values()):6} of {sum(len(cell.items) for cell in cells.values())} to do in {len(cells)}"
            " cells"
        )
        return 0
    _store_cells(folder, asked, cells, store)
    unreadable: set[str] = set()
    with loggers.started(cfg) as log, display.loop_messages(console):
        try:
            with workers.started(cfg) if any(lacking.values()) else nullcontext() as actors:
                for line, cell in cells.items():
                    if lacking[line]:
                        _answering(cell, actors, console).refuse(
                            [generate.plan(cell.config.decoder, cell.config.compile)]
                        )
                for number, (line, cell) in enumerate(cells.items(), 1):
                    if lacking[line]:
                        console.print(Text(f"cell {number} of {len(cells)}: {line}", "bold"))
                        unreadable.update(
                            generate.describe(
                                _answering(cell, actors, console),
                                generate.plan(cell.config.decoder, cell.config.compile),
                                cell.items,
                                store,
                                cell.run,
                            )
                        )
        except KeyboardInterrupt:
            console.print(f"\nStopped; what is done is kept in {store.file}. The same command goes on.", markup=False)
            raise
        report = reported(asked, cells, store, console, folder)
        log(loggers.table(report.sheets[0]))
    console.print(Text(f"{report.title}: {report.on}", "bold"))
    display.sheet(console, report.sheets[0])
    console.print(
        Text(
            f"{len(report.sheets)} tables (csv) and the plot: {folder}"
            + "".join(f"; {page.name}" for page in report.pages)
        )
    )
    if unreadable:
        console.print(
            f"{len(unreadable)} images could not be read: {', '.join(sorted(unreadable))}", style="red", markup=False
        )
    return int(bool(unreadable))


def _check(cfg: DictConfig) -> None:
    """Raises InputError for options that are of one run."""
    check(cfg)
    if cfg.objective is not None:
        raise InputError("objective is a metric of one run, and a study is many; leave it out")
    if cfg.report is not None or cfg.show:
        raise InputError(
            "report and show make a page of one run; of a study, whose cells are of one task: python -m"
            " experiments.report FOLDER"
        )


def _answering(cell: Cell, actors: list | None, console: Console) -> generate.Speaker:
    """Who answers a cell's items: this process, or the actors, and then no model is loaded here."""
    return workers.asked(cell.config, speaker(cell.config, (None, None), console), actors) if actors else cell.speaker()


def _store_cells(folder: Path, asked: Study, cells: dict[str, Cell], store: Results) -> None:
    """`study.json`: the store, and the run of each cell in it."""
    runs = {line: cell.run.id for line, cell in cells.items()}
    place = str(store.file.resolve())
    (folder / "study.json").write_text(json.dumps({"study": asked.name, "results": place, "cells": runs}, indent=1))
