"""`python -m experiments.report RUN...`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hydra.errors import InstantiationException
from rich.console import Console
from rich.text import Text

from decoders import StackError

from ..inputs.errors import InputError
from ..results import DEFAULT, Results, Run, described, differing, same_task
from ..runner import generate
from ..tasks import Task
from . import again, plots
from .page import Page, Said, Shown, html, small


def named(store: Results, asked: list[str]) -> list[Run]:
    """Runs by ids, or how they begin, or by folders that run.py or a study wrote, none twice. Raises InputError."""
    out: dict[str, Run] = {}
    for one in asked:
        folder = Path(one).expanduser()
        if (folder / "study.json").is_file():
            found = [store.run(id) for id in json.loads((folder / "study.json").read_text())["cells"].values()]
        elif folder.is_dir():
            found = [run for run in store.runs() if run.config.get("folder") == str(folder.resolve())]
            if not found:
                raise InputError(
                    f"'{store.file}' has no run of the folder '{one}'; name the store that it went to: --results"
                    " FILE.sqlite"
                )
        else:
            found = [store.run(one)]
        out |= {run.id: run for run in found}
    return list(out.values())


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
    first, *others = metrics
    n, head, rows = metrics[first].get("n", 0), ["", *metrics, *(f"{label} - {first}" for label in others)], []
    for key, title in task.metrics.items() if n else ():
        levels, gaps = (
            [values[key] for values in metrics.values()],
            [metrics[label]["difference"][key] for label in others],
        )
        rows.append(
            [
                title,
                *(f"{v['value']:.1f} [{v['low']:.1f}, {v['high']:.1f}]" for v in levels),
                *(f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}], p = {d['p']:.2g}" for d in gaps),
            ]
        )
    for key, title in (
        ("tokens_per_second", "tokens/s"),
        ("prunes", "prunes per caption"),
        ("rollbacks", "rollbacks per caption"),
    ):
        rows.append([title, *(f"{values[key]:.1f}" for values in metrics.values()), *([""] * len(others))])
    return (
        (
            f"n = {n}; 95 % intervals from a bootstrap over pictures, differences paired"
            if n
            else "Nobody knows what is in these pictures, so nothing is scored"
        ),
        head,
        rows,
    )


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
    store: Results, runs: dict[str, Run], count: int, maps: int, layers: int, batch_size: int, console: Console
) -> tuple[Page, bool]:
    """All that the page shows, and whether Ctrl-C ended the making of maps. Raises InputError."""
    found, notes = together(store, runs), []
    config = next(iter(runs.values())).config
    task, ids = again.task(config), list(next(iter(found.values())))
    metrics = generate.measure(task, {label: list(rows.values()) for label, rows in found.items()})
    chosen = ids[:count]
    if len(chosen) < len(ids):
        notes.append(f"The first {len(chosen)} of {len(ids)} pictures are shown; numbers and plots are of all.")
    shown = [Shown(i, [Said(label, rows[i]) for label, rows in found.items()]) for i in chosen]
    try:
        known = again.items(config, ids)
    except InputError as error:
        known = {}
        notes.append(f"There are no pictures here: {error}")
    for one in shown:
        try:
            if one.id not in known:
                raise OSError("the task does not have it any more")
            image = known[one.id].open()
            one.uri, one.size = small(image), image.size
        except OSError as error:
            one.why = str(error)
    wanted = [one.id for one in sorted((one for one in shown if one.uri), key=lambda one: one.rank)[:maps]]
    seen, stopped = again.look(runs, found, known, wanted, layers, batch_size, console) if wanted else ({}, False)
    for one in shown:
        for said in one.said:
            said.seen = seen.get((said.label, one.id))
    drawn = sum(isinstance(value, again.Seen) for value in seen.values())
    notes += _about_maps(seen, drawn, len(wanted), len(shown), stopped)
    drawn_by = {(said.label, one.id): said.curve for one in shown for said in one.said}
    curves = {
        label: [drawn_by.get((label, i)) or rows[i].get("attention", []) for i in ids] for label, rows in found.items()
    }
    scored = {name: title for name, title in task.metrics.items() if name in task.tested}
    drawings = [
        plots.differences(metrics, scored) if next(iter(metrics.values())).get("n") else None,
        plots.attention(curves),
    ]
    configs = {label: json.dumps(run.config, indent=1) for label, run in runs.items()}
    on = (
        f"{len(ids)} answers of each of {len(runs)} {'stacks' if len(runs) > 1 else 'stack'}, model"
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
            [plot for plot in drawings if plot],
            shown,
            notes,
        ),
        stopped,
    )


def _about_maps(seen: dict, drawn: int, wanted: int, shown: int, stopped: bool) -> list[str]:
    if not wanted:
        return ["No maps of attention were made (--attention 0)."]
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


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=(
            "Write a page of runs of the store: numbers, captions beside one another, and where on the picture the"
            " model looked at each word."
        ),
    )
    out.add_argument(
        "run",
        nargs="+",
        help="ids of runs, or how they begin, or folders that run.py wrote; the others are compared with the first",
    )
    out.add_argument("--results", type=Path, default=DEFAULT, help=f"the store (default: {DEFAULT})")
    out.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    out.add_argument(
        "--count", type=int, default=500, help="pictures shown, the first ones (default: 500); numbers are of all"
    )
    out.add_argument(
        "--attention",
        type=int,
        default=50,
        help=(
            "pictures with maps, those where the stacks differ most; each is described again. 0: none, and no model is"
            " loaded (default: 50)"
        ),
    )
    out.add_argument(
        "--layers", type=int, default=8, help="most layers in a map; more are joined by their mean (default: 8)"
    )
    out.add_argument("--batch-size", type=int, default=8, help="pictures described at a time (default: 8)")
    return out


def main() -> None:
    args = parser().parse_args()
    console, stopped = Console(), False
    try:
        for name, least in (("count", 1), ("attention", 0), ("layers", 1), ("batch_size", 1)):
            if getattr(args, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is an integer >= {least}, not {getattr(args, name)}")
        if not args.results.exists():
            raise InputError(
                f"there is no store '{args.results}' yet; run.py makes it, or name another: --results FILE.sqlite"
            )
        store = Results(args.results)
        made, stopped = page(
            store, labelled(named(store, args.run)), args.count, args.attention, args.layers, args.batch_size, console
        )
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(html(made), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"the page cannot be written: {error}; choose another place: --out FILE.html") from error
    except (InputError, StackError, InstantiationException) as error:
        Console(stderr=True).print(
            Text.assemble(
                ("error: ", "bold red"),
                str(error.__cause__ or error if isinstance(error, InstantiationException) else error),
            )
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for note in made.notes:
        console.print(note, style="yellow", markup=False)
    console.print(Text(f"{args.out}: {len(made.pictures)} pictures, {args.out.stat().st_size / 1e6:.1f} MB"))
    raise SystemExit(130 if stopped else 0)


if __name__ == "__main__":
    main()
