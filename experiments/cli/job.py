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
from ..inputs.errors import InputError
from ..integrations import loggers
from ..results import Results
from ..runner import generate, workers
from ..runner.setup import options, settings, speaker, task
from ..tasks import Files
from . import display, dry_run

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


def job(cfg: DictConfig, folder: Path) -> tuple[int, float | None]:
    """One stack, and the empty one beside it, on a task; returns 1 if pictures could not be read, else 0, and the value
    of the stack's metric that `objective` names.
    """
    told = options(cfg)
    console, asked = Console(), task(cfg)
    if cfg.objective is not None and cfg.objective not in asked.metrics:
        raise InputError(choices(cfg.objective, asked.metrics, "objective"))
    plans = [generate.plan(cfg.decoder, cfg.compile)]
    if cfg.compare and cfg.decoder:
        plans.insert(0, generate.plan({}, cfg.compile))
    if cfg.dry_run:
        picture = asked.first() if isinstance(asked, Files) else Image.new("RGB", dry_run.PICTURE)
        dry_run.show(console, cfg.model, {plan.label: plan.stack for plan in plans}, picture, told, cfg.batch_size)
        return 0, None
    _same_run(cfg, folder)
    store = Results(cfg.results)
    items = asked.items()
    if isinstance(asked, Files) and (line := asked.left_out()):
        console.print(Text(line), style="yellow")
    with loggers.started(cfg) as log, workers.started(cfg) as actors, display.loop_messages(console):
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        one = workers.asked(cfg, speaker(cfg, (None, None) if actors else models.load(cfg.model), console), actors)
        one.refuse(plans)
        own = settings(cfg) | {
            "folder": str(folder.resolve())
        }  # a run of run.py is one of its own, a study's is anyone's
        plain = {k: v for k, v in own.items() if k != "files"} | {"decoder": {}}
        runs = {plan.label: store.open(plan.label, own if plan is plans[-1] else plain) for plan in plans}
        ids, unreadable = [item.id for item in items], []
        try:
            for plan in plans:
                unreadable = generate.describe(one, plan, items, store, runs[plan.label])
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
            display.captions(console, found, cfg.show if not cfg.image else len(items))
            metrics = generate.measure(asked, found)
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
            display.table(console, metrics, asked.metrics, asked.title)
            if cfg.model.weights == "random":
                console.print(
                    "random weights: only time and memory mean anything here, not what was said", style="yellow"
                )
            display.picture(found[plans[-1].label], folder / "attention.png")
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
