"""What `run.py` does: one job, or a study, which is many."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.text import Text

from decoders.compiled import MODES
from decoders.errors import choices

from . import describe, dry, loggers, models, show, workers
from .errors import InputError
from .results import Results, code
from .studies.base import Cell, Report, Study, words
from .tasks import Files, Task

_MAY_CHANGE = (  # options that a run may go on with other values of
    "show",
    "compare",
    "batch_size",
    "group_by_length",
    "compile",
    "results",
    "workers",
    "ray",
    "logger",
    "objective",
)


def check(cfg: DictConfig) -> None:
    """Raises InputError for values that no run can do anything with."""
    for name in ("compare", "dry_run", "images_recursive", "group_by_length"):
        if not isinstance(cfg[name], bool):
            raise InputError(f"{name} is true or false, not {cfg[name]!r}")
    if cfg.compile not in MODES:
        raise InputError(choices(str(cfg.compile), MODES, "compile"))
    task = {} if cfg.image else cfg.task
    for name, value, least in (
        ("show", cfg.show, 0),
        ("batch_size", cfg.batch_size, 1),
        ("max_new_tokens", cfg.max_new_tokens, 1),
        ("task.start", task.get("start"), 0),
        ("task.count", task.get("count"), 1),
    ):
        if (value is not None or "." not in name) and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise InputError(f"{name} is an integer >= {least}, not {value!r}")


def task(cfg: DictConfig) -> Task:
    """The task of a config: its own, or someone's pictures."""
    return Files(cfg.image, cfg.images_recursive) if cfg.image else instantiate(cfg.task)


def options(cfg: DictConfig) -> dict:
    """What `generate` is given. Raises InputError for what no run can do."""
    check(cfg)
    if cfg.search.get("num_return_sequences", 1) != 1:
        raise InputError(
            "run.py scores one answer a question; leave num_return_sequences at 1 (the library returns several)"
        )
    return dict(OmegaConf.to_container(cfg.search)) | {"max_new_tokens": cfg.max_new_tokens}


def settings(cfg: DictConfig) -> dict:
    """All of a config that decides what is answered to each question; how many there are does so under sampling only,
    where the rows of a batch draw together.
    """
    kept = {k: OmegaConf.to_container(cfg[k], resolve=True) for k in ("decoder", "search", "task")}
    if cfg.image:
        kept["task"] = {"image": str(Path(cfg.image).expanduser().resolve())}
        kept["task"] |= {"recursive": True} if cfg.images_recursive else {}  # runs of before know no such option
    kept |= {"model": models.identity(cfg.model), "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}
    if files := _files(kept["decoder"]):
        kept["files"] = files
    if cfg.search.do_sample:
        return kept | {"batch_size": cfg.batch_size}
    for place in ("start", "count"):
        kept["task"].pop(place, None)
    return kept


def _files(decoders: dict) -> dict[str, str]:
    """Digests of the files that options of decoders name, by option."""
    named = {f"{name}.{option}": value for name, options in decoders.items() for option, value in options.items()}
    return {
        option: models.file_digest(Path(value).expanduser())
        for option, value in named.items()
        if isinstance(value, str) and Path(value).expanduser().is_file()
    }


def speaker(cfg: DictConfig, loaded: tuple, console: Console) -> describe.Speaker:
    return describe.Speaker(
        *loaded,
        cfg.model.prompt,
        options(cfg),
        console,
        cfg.batch_size,
        cfg.seed,
        models.template(cfg.model),
        cfg.group_by_length,
    )


def job(cfg: DictConfig, folder: Path) -> tuple[int, float | None]:
    """One stack, and the empty one beside it, on a task; returns 1 if pictures could not be read, else 0, and the value
    of the stack's metric that `objective` names.
    """
    generate = options(cfg)
    console, asked = Console(), task(cfg)
    if cfg.objective is not None and cfg.objective not in asked.metrics:
        raise InputError(choices(cfg.objective, asked.metrics, "objective"))
    plans = [describe.plan(cfg.decoder, cfg.compile)]
    if cfg.compare and cfg.decoder:
        plans.insert(0, describe.plan({}, cfg.compile))
    if cfg.dry_run:
        picture = asked.first() if isinstance(asked, Files) else Image.new("RGB", dry.PICTURE)
        dry.show(console, cfg.model, {plan.label: plan.stack for plan in plans}, picture, generate, cfg.batch_size)
        return 0, None
    _same_run(cfg, folder)
    store = Results(cfg.results)
    items = asked.items()
    if isinstance(asked, Files) and (line := asked.left_out()):
        console.print(Text(line), style="yellow")
    with loggers.started(cfg) as log, workers.started(cfg) as actors, show.loop_messages(console):
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        one = _asked(cfg, speaker(cfg, (None, None) if actors else models.load(cfg.model), console), actors)
        one.refuse(plans)
        own = settings(cfg) | {
            "folder": str(folder.resolve())
        }  # a run of run.py is one of its own, a study's is anyone's
        plain = {k: v for k, v in own.items() if k != "files"} | {"decoder": {}}
        runs = {plan.label: store.open(plan.label, own if plan is plans[-1] else plain) for plan in plans}
        ids, unreadable = [item.id for item in items], []
        try:
            for plan in plans:
                unreadable = describe.describe(one, plan, items, store, runs[plan.label])
        except KeyboardInterrupt:
            _write(folder, {label: store.rows(run, ids) for label, run in runs.items()})
            console.print(
                f"\nStopped; {sum(len(store.done(run)) for run in runs.values())} captions are kept in {store.file}."
                f" The same command with this goes on:\n  {'='.join(_place(folder))}",
                markup=False,
                soft_wrap=True,
            )
            raise
        found = {label: store.rows(run, ids) for label, run in runs.items()}
        _write(folder, found)
        asked.export(found[plans[-1].label], folder)
        metrics = {}
        if any(found.values()):
            show.captions(console, found, cfg.show if not cfg.image else len(items))
            metrics = describe.measure(asked, found)
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
            show.table(console, metrics, asked.metrics, asked.title)
            if cfg.model.weights == "random":
                console.print(
                    "random weights: only time and memory mean anything here, not what was said", style="yellow"
                )
            show.picture(found[plans[-1].label], folder / "attention.png")
            log(loggers.numbers(metrics))
    console.print(Text(f"captions, metrics, config and picture: {folder}"))
    if unreadable:
        console.print(
            f"{len(unreadable)} of {len(items)} images could not be read: {', '.join(unreadable)}",
            style="red",
            markup=False,
        )
    return int(bool(unreadable)), metrics.get(plans[-1].label, {}).get(cfg.objective, {}).get("value")


def _place(folder: Path) -> tuple[str, str]:
    """The option that says where a command writes, and what it is for this job."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return "hydra.sweep.dir", f"'{Path(HydraConfig.get().sweep.dir).resolve()}'"
    return "hydra.run.dir", f"'{folder}'"


def _asked(cfg: DictConfig, here: describe.Speaker, actors: list | None) -> describe.Speaker:
    return workers.Crew.of(here, cfg.model, actors) if actors else here


def _write(folder: Path, found: dict[str, list[dict]]) -> None:
    """`captions.jsonl`: a line an answer and stack."""
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for rows in found.values() for row in rows))


def _same_run(cfg: DictConfig, folder: Path) -> None:
    """Captions of other settings must not be taken for this run's."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before, now = OmegaConf.to_container(OmegaConf.load(file)), OmegaConf.to_container(cfg, resolve=True)
    changed = sorted(k for k in before.keys() | now.keys() if k not in _MAY_CHANGE and before.get(k) != now.get(k))
    if changed:
        raise InputError(
            f"the output folder '{folder}' holds a run with other settings ({', '.join(changed)}); choose another:"
            f" {_place(folder)[0]}=FOLDER"
        )


def study(cfg: DictConfig, folder: Path, typed: list[str]) -> int:
    """Run every cell of a study that is not in the store yet, then show and write what they say; returns 1 if pictures
    could not be read.
    """
    check(cfg)
    if cfg.objective is not None:
        raise InputError("objective is a metric of one run, and a study is many; leave it out")
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
    _store_cells(folder, asked, cells)
    unreadable: set[str] = set()
    with loggers.started(cfg) as log, show.loop_messages(console):
        try:
            with workers.started(cfg) if any(lacking.values()) else nullcontext() as actors:
                for line, cell in cells.items():
                    if lacking[line]:
                        _answering(cell, actors, console).refuse(
                            [describe.plan(cell.config.decoder, cell.config.compile)]
                        )
                for number, (line, cell) in enumerate(cells.items(), 1):
                    if lacking[line]:
                        console.print(Text(f"cell {number} of {len(cells)}: {line}", "bold"))
                        unreadable.update(
                            describe.describe(
                                _answering(cell, actors, console),
                                describe.plan(cell.config.decoder, cell.config.compile),
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
    show.sheet(console, report.sheets[0])
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


def _answering(cell: Cell, actors: list | None, console: Console) -> describe.Speaker:
    """Who answers a cell's items: this process, or the actors, and then no model is loaded here."""
    return _asked(cell.config, speaker(cell.config, (None, None), console), actors) if actors else cell.speaker()


def _store_cells(folder: Path, asked: Study, cells: dict[str, Cell]) -> None:
    """`study.json`: the run of each cell in the store."""
    (folder / "study.json").write_text(
        json.dumps({"study": asked.name, "cells": {line: cell.run.id for line, cell in cells.items()}}, indent=1)
    )


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
        plan = describe.plan(conf.decoder)
        cells[line] = Cell(
            line,
            conf,
            *tasks[key],
            store.open(plan.label, settings(conf)),
            [],
            partial(_speaker, conf, loaded, console),
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


def _speaker(conf: DictConfig, loaded: dict, console: Console) -> describe.Speaker:
    """The model of a config, the last one kept."""
    key = json.dumps(OmegaConf.to_container(conf.model, resolve=True), sort_keys=True)
    if key not in loaded:
        loaded.clear()
        loaded[key] = models.load(conf.model)
    return speaker(conf, loaded[key], console)
