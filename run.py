"""The main job: `python run.py` describes held-out scenes with and without PruneHal, and measures hallucination."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.text import Text

from decoders import StackError
from experiments import overrides
from experiments.errors import InputError


def job(cfg: DictConfig) -> int:
    """One run; returns the number of pictures that could not be read."""
    from experiments import data, describe, dry, models, show

    console = Console()
    folder = Path(HydraConfig.get().runtime.output_dir)
    for name in ("batch_size", "max_new_tokens"):
        if isinstance(cfg[name], bool) or not isinstance(cfg[name], int) or cfg[name] < 1:
            raise InputError(f"{name} is an integer >= 1, not {cfg[name]!r}")
    plans = describe.plans(cfg.decoder, cfg.compare)
    options = dict(OmegaConf.to_container(cfg.search)) | {"max_new_tokens": cfg.max_new_tokens}
    if cfg.dry_run:
        picture = data.first(cfg.image) if cfg.image else Image.new("RGB", dry.PICTURE)
        dry.show(console, cfg.model, {plan.label: plan.stack for plan in plans}, picture, options, cfg.batch_size)
        return 0
    _same_run(cfg, folder)
    store = describe.Store(folder)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    if cfg.search.get("num_return_sequences", 1) != 1:
        raise InputError("run.py scores one caption an image; leave num_return_sequences at 1 (the library returns several)")
    items = list(data.files(cfg.image) if cfg.image else data.scenes(cfg.task.split, cfg.task.form, cfg.task.start, cfg.task.count))
    model, processor = models.load(cfg.model)
    for plan in plans:  # before the empty stack spends its time
        for name, why in plan.stack.refusals(model).items():
            if why:
                raise InputError(f"{name} cannot act on {type(model).__name__}: {why}")
    unreadable: list[str] = []
    try:
        for plan in plans:
            unreadable = describe.describe(model, processor, plan, items, store, cfg.model.prompt, cfg.batch_size, options, cfg.seed, console, models.template(cfg.model))
    except KeyboardInterrupt:
        console.print(f"\nStopped; {len(store.rows)} captions are kept in {store.file}. The same command with this goes on:\n  hydra.run.dir='{folder}'", markup=False)
        raise
    labels = [plan.label for plan in plans]
    ids = {item.id for item in items}
    rows = [row for row in store.rows if row["image"] in ids and row["stack"] in labels]
    if rows:
        show.captions(console, rows, labels, cfg.show if not cfg.image else len(items))
        metrics = describe.measure(rows, labels)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        show.table(console, metrics, cfg.image or f"{cfg.task.form} scenes of the {cfg.task.split} split")
        if cfg.model.weights == "random":
            console.print("random weights: only time and memory mean anything here, not what was said", style="yellow")
        show.picture([row for row in rows if row["stack"] == labels[-1]], folder / "attention.png")
    console.print(Text(f"captions, metrics, config and picture: {folder}"))
    if unreadable:
        console.print(f"{len(unreadable)} of {len(items)} images could not be read: {', '.join(unreadable)}", style="red", markup=False)
    return len(unreadable)


def _same_run(cfg: DictConfig, folder: Path) -> None:
    """Captions of other settings must not be taken for this run's."""
    file = folder / "config.yaml"
    if not file.exists():
        return
    before, now = OmegaConf.to_container(OmegaConf.load(file)), OmegaConf.to_container(cfg, resolve=True)
    changed = sorted(k for k in before.keys() | now.keys() if k not in ("show", "compare", "batch_size") and before.get(k) != now.get(k))
    if changed:
        raise InputError(f"the output folder '{folder}' holds a run with other settings ({', '.join(changed)}); choose another: hydra.run.dir=FOLDER")


failures: list[int] = []  # exit codes of jobs; one that fails does not stop the others of a multirun


@hydra.main(config_path="conf", config_name="run", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        if job(cfg):
            failures.append(1)
    except hydra.errors.InstantiationException as error:
        failures.append(_say(error.__cause__ or error))
    except (InputError, StackError) as error:
        failures.append(_say(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _say(error: BaseException) -> int:
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
    return 2


if __name__ == "__main__":
    try:
        sys.argv[1:] = overrides.ordered(sys.argv[1:])
        overrides.check(sys.argv[1:])
    except InputError as error:
        raise SystemExit(_say(error)) from None
    main()
    raise SystemExit(max(failures, default=0))
