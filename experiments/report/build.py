"""What the page shows, made of the store: which runs, their numbers, settings, captions and maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..inputs.errors import InputError
from ..results import Results, Run, described, differing, metric_rows, same_task
from ..runner import generate
from ..tasks import Item, Task
from . import again, plots
from .page import Page, Plot, Said, Shown, html, small

COUNT, MAPS, LAYERS, BATCH = 500, 50, 8, 8  # of `page`


def labelled(runs: list[Run]) -> dict[str, Run]:
    """The runs by labels that tell them apart: the stack, and where several have the same, the settings that differ
    among these.
    """
    out = {}
    for run in runs:
        alike = [other for other in runs if other.label == run.label]
        label = " ".join(
            [
                run.label,
                *(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in differing(alike)[alike.index(run)].items()),
            ]
        )
        out[label if label not in out else f"{label} {run.id}"] = run
    return out


def together(store: Results, runs: dict[str, Run]) -> dict[str, dict[str, dict]]:
    """The answers of each run by item, of the items that all have. Raises InputError where that is none, or tasks
    differ.
    """
    (first, base), *others = runs.items()
    for label, run in others:
        if not same_task(run, base):
            raise InputError(
                f"only runs of one task go on one page: {base.id} {first} is on {described(base.config)['task']},"
                f" {run.id} {label} on {described(run.config)['task']}"
            )
    found = {label: {row["image"]: row for row in store.rows(run)} for label, run in runs.items()}
    common = [i for i in found[first] if all(i in rows for rows in found.values())]
    if not common:
        raise InputError(
            "these runs have no picture in common:"
            f" {', '.join(f'{run.id} has {len(found[label])}' for label, run in runs.items())} answers"
        )
    return {label: {i: rows[i] for i in common} for label, rows in found.items()}


def numbers(task: Task, metrics: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """The table of metrics: what it is, its head and its rows."""
    n = next(iter(metrics.values())).get("n", 0)
    scored = f"n = {n}; 95 % intervals from a bootstrap over pictures, differences paired"
    unscored = "Nobody knows what is in these pictures, so nothing is scored"
    return scored if n else unscored, *metric_rows(metrics, task.metrics, p=True)


def settings(store: Results, runs: dict[str, Run]) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """What was run: names and values that all share, and those of each stack that differ."""
    told = {}
    for label, run in runs.items():
        words, made = described(run.config), store.codes([run.id])
        code = ", ".join(f"{version} ({n} answers)" if len(made) > 1 else version for version, n in made.items())
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        told[label] = {"run": run.id, "begun": run.created[:16].replace("T", " "), "answers": str(run.count)}
        told[label] |= {
            f"{name}:": ", ".join(f"{k}={v}" for k, v in options.items() if k != "_target_")
            for name, options in (run.config.get("decoder") or {}).items()
        }
        told[label] |= {key: words[key] for key in ("search", "task", "model", "prompt")}
        told[label] |= {
            "most new tokens": str(run.config.get("max_new_tokens", "")),
            "seed": str(run.config.get("seed", "")),
            "code": code,
            "versions": versions,
        }
    first, *others = told.values()
    alike = [key for key, value in first.items() if all(other.get(key) == value for other in others)]
    return [(key, first[key]) for key in alike if first[key]], {
        label: [(key, value) for key, value in one.items() if key not in alike and value] for label, one in told.items()
    }


def page(
    store: Results,
    runs: dict[str, Run],
    console: Console,
    count: int = COUNT,
    maps: int = MAPS,
    layers: int = LAYERS,
    batch_size: int = BATCH,
    load: Callable[[dict], tuple] = again.stored_model,
) -> tuple[Page, bool]:
    """All that the page shows, and whether Ctrl-C ended the making of maps. Raises InputError.

    Args:
        runs: by label; the others are compared with the first.
        count: pictures shown, the first ones; numbers are of all.
        maps: pictures with maps of attention, which are described again for it.
        layers: most layers in a map; more are joined by their mean.
        batch_size: pictures described again at a time.
        load: makes the model and processor of a run's settings.
    """
    found, notes = together(store, runs), []
    config = next(iter(runs.values())).config
    task, ids = again.task(config), list(next(iter(found.values())))
    metrics = generate.measure(task, {label: list(rows.values()) for label, rows in found.items()})
    chosen = ids[:count]
    if len(chosen) < len(ids):
        notes.append(f"The first {len(chosen)} of {len(ids)} pictures are shown; numbers and plots are of all.")
    try:
        known = again.items(config, ids)
    except InputError as error:
        known = {}
        notes.append(f"There are no pictures here: {error}")
    shown = _pictures(found, chosen, known)
    wanted = [one.id for one in sorted((one for one in shown if one.uri), key=lambda one: one.rank)[:maps]]
    seen, stopped = again.look(runs, found, known, wanted, layers, batch_size, console, load) if wanted else ({}, False)
    for one in shown:
        for said in one.said:
            said.seen = seen.get((said.label, one.id))
    drawn = sum(isinstance(value, again.Seen) for value in seen.values())
    notes += _about_maps(seen, drawn, len(wanted), len(shown), stopped)
    configs = {label: json.dumps(run.config, indent=1) for label, run in runs.items()}
    on = (
        f"{_count(len(ids), 'answer')} of each of {_count(len(runs), 'stack')}, model"
        f" {', '.join(dict.fromkeys(str(run.config.get('model', {}).get('path')) for run in runs.values()))}."
    )
    return (
        Page(
            task.title,
            on,
            list(runs),
            *settings(store, runs),
            configs,
            *numbers(task, metrics),
            _drawings(task, metrics, found, shown),
            shown,
            notes,
        ),
        stopped,
    )


def _pictures(found: dict[str, dict[str, dict]], chosen: list[str], known: dict[str, Item]) -> list[Shown]:
    """The pictures chosen, by id, with what was said of each; why it is not shown, where it cannot be read."""
    shown = [Shown(i, [Said(label, rows[i]) for label, rows in found.items()]) for i in chosen]
    for one in shown:
        try:
            if one.id not in known:
                raise OSError("the task does not have it any more")
            image = known[one.id].open()
            one.uri, one.size = small(image), image.size
        except OSError as error:
            one.why = str(error)
    return shown


def _drawings(
    task: Task, metrics: dict[str, dict], found: dict[str, dict[str, dict]], shown: list[Shown]
) -> list[Plot]:
    """The plots of what can be plotted: differences where anything is scored, attention where it is known."""
    seen = {(said.label, one.id): said.curve for one in shown for said in one.said}
    curves = {
        label: [seen.get((label, i)) or row.get("attention", []) for i, row in rows.items()]
        for label, rows in found.items()
    }
    scored = {name: title for name, title in task.metrics.items() if name in task.tested}
    gaps = plots.differences(metrics, scored) if next(iter(metrics.values())).get("n") else None
    return [plot for plot in (gaps, plots.attention(curves)) if plot]


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _about_maps(seen: dict, drawn: int, wanted: int, shown: int, stopped: bool) -> list[str]:
    if not wanted:
        return ["No maps of attention were made."]
    out = [
        (
            f"Maps of attention are of {wanted} of {shown} pictures, those in which the stacks differ most."
            if wanted < shown
            else ""
        )
    ]
    sizes = next((value.layers for value in seen.values() if isinstance(value, again.Seen)), [])
    if max(sizes, default=1) > 1:
        out.append(f"In them, {sum(sizes)} layers are joined to {len(sizes)}, by their mean.")
    if len(seen) > drawn:
        out.append(f"{len(seen) - drawn} captions have none; it says why beside them.")
    if stopped:
        out.append(f"The making of maps was stopped: {drawn} captions have one.")
    return [" ".join(text for text in out if text)] if any(out) else []


def save(made: Page, file: Path) -> None:
    """Write the page, in place of what is there. Raises InputError where that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html(made), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"the page '{file}' cannot be written: {error.strerror}; choose another place") from error


def tell(made: Page, file: Path, console: Console) -> None:
    """Say what the page lacks, and where it is."""
    for note in made.notes:
        console.print(note, style="yellow", markup=False)
    size = file.stat().st_size / 1e6
    console.print(Text(f"page: {file}, {_count(len(made.pictures), 'picture')}, {size:.1f} MB"), soft_wrap=True)
