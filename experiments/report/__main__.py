"""`python -m experiments.report RUN...`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hydra.errors import InstantiationException
from rich.console import Console

from decoders import StackError

from ..inputs.errors import InputError, say
from ..results import DEFAULT, Results, Run
from . import build

_FILES = ("study.json", "runs.json")  # of which run.py writes one into a folder


def _written(folder: Path) -> dict:
    """What a folder's own file says of its runs: `runs`, their ids by label or line, and `results`, their store.

    Empty where there is no such file, as in folders of earlier versions. Raises InputError for one that is broken.
    """
    for name in _FILES:
        if (file := folder / name).is_file():
            try:
                found = json.loads(file.read_text())
                return {"runs": dict(found["runs"] if "runs" in found else found["cells"]), **_place(found)}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"'{file}' does not say which runs are the folder's: {error}") from error
    return {}


def _place(found: dict) -> dict[str, Path]:
    return {"results": Path(found["results"])} if "results" in found else {}


def opened(asked: list[str], given: Path | None) -> Results:
    """The store that is given, else the one that the folders among what is asked for name, else the default. Raises
    InputError where it is missing, or the folders name several.
    """
    if given is None:
        named = [_written(Path(one).expanduser()).get("results") for one in asked]
        files = list(dict.fromkeys(file for file in named if file))
        if len(files) > 1:
            raise InputError(
                f"these runs are in {len(files)} stores: {', '.join(map(str, files))}; copy them into one, `python -m"
                " experiments.results --results ALL.sqlite merge OTHER.sqlite ...`, and name it: --results ALL.sqlite"
            )
        given = files[0] if files else DEFAULT
    if not given.exists():
        raise InputError(f"there is no store '{given}'; run.py makes it, or name another: --results FILE.sqlite")
    return Results(given)


def named(store: Results, asked: list[str]) -> list[Run]:
    """Runs by ids, or how they begin, or by folders that run.py or a study wrote, none twice. Raises InputError."""
    out: dict[str, Run] = {}
    for one in asked:
        folder = Path(one).expanduser()
        if written := _written(folder):
            found = [store.run(id) for id in written["runs"].values()]
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


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=(
            "Write a page of runs of the store: numbers, captions beside one another, and where on the picture the"
            " model looked at each word. Of one run, run.py does so itself: report=FILE.html."
        ),
    )
    out.add_argument(
        "run",
        nargs="+",
        help="ids of runs, or how they begin, or folders that run.py wrote; the others are compared with the first",
    )
    out.add_argument("--results", type=Path, help=f"the store (default: the one that the folders name, else {DEFAULT})")
    out.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    numbers = {
        "--count": (build.COUNT, "pictures shown, the first ones; numbers are of all"),
        "--attention": (
            build.MAPS,
            "pictures with maps, those where the stacks differ most; each is described again. 0: none, and no model is"
            " loaded",
        ),
        "--layers": (build.LAYERS, "most layers in a map; more are joined by their mean"),
        "--batch-size": (build.BATCH, "pictures described at a time"),
    }
    for name, (default, told) in numbers.items():
        out.add_argument(name, type=int, default=default, help=f"{told} (default: {default})")
    return out


def main() -> None:
    args = parser().parse_args()
    console, stopped = Console(), False
    try:
        for name, least in (("count", 1), ("attention", 0), ("layers", 1), ("batch_size", 1)):
            if getattr(args, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is an integer >= {least}, not {getattr(args, name)}")
        store = opened(args.run, args.results)
        runs = build.labelled(named(store, args.run))
        made, stopped = build.page(store, runs, console, args.count, args.attention, args.layers, args.batch_size)
        build.save(made, args.out)
    except (InputError, StackError, InstantiationException) as error:
        inner = error.__cause__ if isinstance(error, InstantiationException) else None
        raise SystemExit(say(inner or error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    build.tell(made, args.out, console)
    raise SystemExit(130 if stopped else 0)


if __name__ == "__main__":
    main()
