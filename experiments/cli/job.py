"""One run: a stack, and the empty one beside it, on a task."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.text import Text

from decoders.errors import choices

from .. import models
from ..inputs import conf_files
from ..inputs.errors import InputError
from ..integrations import loggers
from ..results import Results, Run
from ..runner import generate, workers
from ..runner.setup import options, settings, speaker, task
from ..tasks import Files, Item, Task
from . import display, dry_run, page

_MAY_CHANGE = (  # options that a run may go on with other values of
    "captions",
    "report",
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


def job(cfg: DictConfig, folder: Path) -> tuple[int, float | None]:
    """One stack, and another beside it, on a task; returns 1 if pictures could not be read, else 0, and the value of
    the stack's metric that `objective` names.
    """
    told = options(cfg)
    console, asked, paged = Console(), task(cfg), page.file(cfg, folder)
    if cfg.objective is not None and cfg.objective not in asked.metrics:
        raise InputError(choices(cfg.objective, asked.metrics, "objective"))
    configs = _compared(cfg, paged is not None)
    plans = [generate.plan(one.decoder, one.compile) for one in configs]
    main = plans[configs.index(cfg)].label
    if cfg.dry_run:
        picture = asked.first() if isinstance(asked, Files) else Image.new("RGB", dry_run.PICTURE)
        dry_run.show(console, cfg.model, {plan.label: plan.stack for plan in plans}, picture, told, cfg.batch_size)
        return 0, None
    _same_run(cfg, folder)
    items, store = asked.items(), Results(cfg.results)
    if isinstance(asked, Files) and (line := asked.left_out()):
        console.print(Text(line), style="yellow")
    with loggers.started(cfg) as log, workers.started(cfg) as actors, display.loop_messages(console):
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        loaded = (None, None) if actors else models.load(cfg.model)
        one = workers.asked(cfg, speaker(cfg, loaded, console), actors)
        one.refuse(plans)
        place = {"folder": str(folder.resolve())}  # a run of run.py is one of its own, a study's is anyone's
        runs = {
            plan.label: store.open(plan.label, settings(own) | place) for plan, own in zip(plans, configs, strict=True)
        }
        _name_runs(folder, store, runs)
        unreadable = _answer(one, plans, items, store, runs, folder)
        found = {label: store.rows(run, [item.id for item in items]) for label, run in runs.items()}
        _write(folder, found)
        asked.export(found[main], folder)
        metrics = _shown(cfg, asked, found, main, folder, console) if any(found.values()) else {}
        if metrics:
            log(loggers.numbers(metrics))
    console.print(Text(f"captions, metrics, config and picture: {folder}"))
    if unreadable:
        console.print(
            f"{len(unreadable)} of {len(items)} images could not be read: {', '.join(unreadable)}",
            style="red",
            markup=False,
        )
    if paged and metrics:
        load = (lambda _: models.load(cfg.model)) if actors else (lambda _: loaded)
        page.write(paged, cfg.show, store, runs.values(), cfg.batch_size, load, console)
    return int(bool(unreadable)), metrics.get(main, {}).get(cfg.objective, {}).get("value")


def _compared(cfg: DictConfig, paged: bool) -> list[DictConfig]:
    """The run's own config, and, to compare, that of plain decoding before it; or, on a page of plain decoding, that of
    PruneHal behind it.
    """
    if not cfg.compare or not (cfg.decoder or paged):
        return [cfg]
    beside = {} if cfg.decoder else conf_files.read("decoder", "prunehal")
    other = OmegaConf.create(OmegaConf.to_container(cfg) | {"decoder": beside})
    return [other, cfg] if cfg.decoder else [cfg, other]


def _name_runs(folder: Path, store: Results, runs: dict[str, Run]) -> None:
    """`runs.json`: the store, and the run of each stack in it."""
    named = {"results": str(store.file.resolve()), "runs": {label: run.id for label, run in runs.items()}}
    (folder / "runs.json").write_text(json.dumps(named, indent=1))


def _answer(
    one: generate.Speaker,
    plans: list[generate.Plan],
    items: list[Item],
    store: Results,
    runs: dict[str, Run],
    folder: Path,
) -> list[str]:
    """Answer what the store lacks; returns the ids of pictures that could not be read. On Ctrl-C what is done is
    written, and how to go on is said.
    """
    unreadable: list[str] = []
    try:
        for plan in plans:
            unreadable = generate.describe(one, plan, items, store, runs[plan.label])
    except KeyboardInterrupt:
        _write(folder, {label: store.rows(run, [item.id for item in items]) for label, run in runs.items()})
        one.console.print(
            f"\nStopped; {sum(len(store.done(run)) for run in runs.values())} captions are kept in {store.file}."
            f" The same command with this goes on:\n  {'='.join(_place(folder))}",
            markup=False,
            soft_wrap=True,
        )
        raise
    return unreadable


def _shown(
    cfg: DictConfig, asked: Task, found: dict[str, list[dict]], main: str, folder: Path, console: Console
) -> dict[str, dict]:
    """Captions and metrics, shown and written; returns the metrics by label."""
    display.captions(console, found, cfg.captions if not cfg.image else max(map(len, found.values())))
    metrics = generate.measure(asked, found)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    display.table(console, metrics, asked.metrics, asked.title)
    display.repeated(console, found)
    if cfg.model.weights == "random":
        console.print("random weights: only time and memory mean anything here, not what was said", style="yellow")
    display.picture(found[main], folder / "attention.png")
    return metrics


def _place(folder: Path) -> tuple[str, str]:
    """The option that says where a command writes, and what it is for this job."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return "hydra.sweep.dir", f"'{Path(HydraConfig.get().sweep.dir).resolve()}'"
    return "hydra.run.dir", f"'{folder}'"


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
