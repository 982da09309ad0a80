"""What runs are: their settings in words, where they differ, which of them match a filter."""

from __future__ import annotations

import re

import hydra
import yaml

from decoders.errors import choices

from ..inputs.errors import InputError
from .store import Run


def same_task(one: Run, two: Run) -> bool:
    """Whether two runs were asked the same, but for how much of it."""
    first, second = (
        {k: v for k, v in (run.config.get("task") or {}).items() if k not in ("start", "count")} for run in (one, two)
    )
    return first == second


def made(config: dict, kind: type) -> object:
    """The object that a stored config describes. A store may be someone else's: raises InputError unless the config
    names a class of this kind, and nothing else that is to be called.
    """
    try:
        if str(config).count("'_target_'") != 1 or not issubclass(hydra.utils.get_class(config["_target_"]), kind):
            raise InputError(f"the store's {config} describes no {kind.__name__}; nothing of it was run")
    except (ImportError, ValueError, KeyError) as error:
        raise InputError(f"the store's {config} describes no {kind.__name__} that there is here: {error}") from error
    return hydra.utils.instantiate(config)


def described(config: dict) -> dict[str, str]:
    """A run's settings in words, for tables and filters: its decoders, kind of search, task, model, prompt, folder."""
    task, decoders, search, model = (config.get(k) or {} for k in ("task", "decoder", "search", "model"))
    kind = (
        ""
        if not search
        else "beam"
        if search.get("num_beams", 1) != 1
        else "sampling"
        if search.get("do_sample")
        else "greedy"
    )
    return {
        "decoder": f"[{','.join(decoders)}]" if isinstance(decoders, dict) else str(decoders),
        "search": " ".join([kind, *(f"{k}={v}" for k, v in search.items())]).strip(),
        "task": (
            " ".join(
                [
                    str(task.get("_target_", "")).rsplit(".", 1)[-1],
                    *(f"{k}={v}" for k, v in task.items() if k != "_target_"),
                ]
            ).strip()
        ),
        "model": str(model.get("path")) if isinstance(model, dict) else str(model),
        "prompt": str((model.get("prompt") if isinstance(model, dict) else None) or config.get("prompt")),
        "folder": config.get("folder", ""),
    }


def flat(tree: dict, name: str = "") -> dict[str, object]:
    """The leaves of a tree by their names with dots."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= flat(value, f"{name}{key}.") if isinstance(value, dict) and value else {name + key: value}
    return out


def settings(config: dict) -> dict[str, object]:
    """A run's settings by their names on run.py's command line (`decoder.NAME.option`), but for the folder and digests
    of files.
    """
    return {
        k: v
        for k, v in flat(config).items()
        if v != {} and not {"folder", "files", "adapter files"} & set(k.split("."))
    }


def differing(runs: list[Run]) -> list[dict[str, str]]:
    """Of each run the settings that have other values in some of the runs that have them."""
    known = [{k: str(v) for k, v in settings(run.config).items()} for run in runs]
    values: dict[str, set[str]] = {}
    for one in known:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    return [{k: v for k, v in one.items() if len(values[k]) > 1} for one in known]


def matching(runs: list[Run], filters: list[str]) -> list[Run]:
    """Runs that hold every filter: `text`, whole words of any of `described`; `key=text`, of one of these; id and code,
    by how they begin; `option=value`, as on run.py's command line.

    Raises InputError for a key that there is not.
    """
    words = {run.id: described(run.config) | {"id": run.id, "code": run.code} for run in runs}
    options = {run.id: settings(run.config) for run in runs}
    keys = {k for one in (*words.values(), *options.values()) for k in one}

    def holds(run: Run, one: str) -> bool:
        key, equals, text = one.partition("=")
        if key in ("id", "code"):
            return words[run.id][key].startswith(text)
        if not equals or key in words[run.id]:
            return bool(
                re.search(
                    rf"(?<!\w){re.escape(text if equals else one)}(?!\w)",
                    words[run.id][key] if equals else " ".join(words[run.id].values()),
                )
            )
        return key in options[run.id] and options[run.id][key] == yaml.safe_load(text)

    for one in filters:
        key, equals, _ = one.partition("=")
        if runs and equals and key not in keys:
            raise InputError(choices(key, keys, "filter"))
    return [run for run in runs if all(holds(run, one) for one in filters)]
