"""What a configuration makes: the task, the options of `generate`, the settings that identify a run, the model."""

from __future__ import annotations

import json
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from decoders.compiled import MODES
from decoders.errors import choices

from .. import models
from ..inputs.errors import InputError
from ..tasks import Files, Task
from . import generate


def check(cfg: DictConfig) -> None:
    """Raises InputError for values that no run can do anything with."""
    for name in ("compare", "dry_run", "images_recursive", "group_by_length", "show"):
        if not isinstance(cfg[name], bool):
            raise InputError(f"{name} is true or false, not {cfg[name]!r}")
    if cfg.compile not in MODES:
        raise InputError(choices(str(cfg.compile), MODES, "compile"))
    task = {} if cfg.image else cfg.task
    for name, value, least in (
        ("captions", cfg.captions, 0),
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


def speaker(cfg: DictConfig, loaded: tuple, console: Console) -> generate.Speaker:
    return generate.Speaker(
        *loaded,
        cfg.model.prompt,
        options(cfg),
        console,
        cfg.batch_size,
        cfg.seed,
        models.template(cfg.model),
        cfg.group_by_length,
    )


def speaker_of(conf: DictConfig, loaded: dict, console: Console) -> generate.Speaker:
    """The model of a config, the last one kept."""
    key = json.dumps(OmegaConf.to_container(conf.model, resolve=True), sort_keys=True)
    if key not in loaded:
        loaded.clear()
        loaded[key] = models.load(conf.model)
    return speaker(conf, loaded[key], console)
