"""What decoding costs: `python -m experiments.bench.decode`.

Decode ms per token of stacks against transformers' own `generate` with the same search, on a randomly initialised LLaVA
of about 110 M parameters with 576 visual tokens, or on a model of `conf/model` at full size with random weights
(`--model`). Two lengths are subtracted, so that prefill does not count; it is reported beside. Every repeat runs all
rows one after the other, in changing order; ratios are taken within a repeat, and medians over repeats. No token ends
an answer. `--memory`, `--profile`, `--launches` and `--compiling` measure memory, where the time goes, kernels a step,
and seconds of compiling, in place of time.

The floor is the time in which memory moves what a step reads: the weights of each forward, and the keys and values that
attention is given.

With beams, `opera by C+1 forwards` is what OPERA costs when each candidate is run and thrown away, as in its official
code. That row never goes back; `[opera]` does when its threshold is passed, and the column `rollbacks` says how often
it did. With `--peer mitigv`, methods of that library are timed as well, if it is installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from decoders import StackError
from experiments import models
from experiments.cli import dry_run
from experiments.inputs.errors import InputError

from . import launches, measures, peers, tables
from .ways import SIZES, STACKS, Row, alone, build, full_size, inputs, options, rows

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    console = Console(width=max(124, Console().width))  # what the tables need
    try:
        if args.rss or args.compile_one:
            print(json.dumps(_one(args)))
        elif args.launches:
            _launches(args, console)
        else:
            _measure(args, console)
    except StackError as error:
        raise SystemExit(f"error: {error}") from error


def _one(args: argparse.Namespace) -> dict:
    """What a process that measures one row tells."""
    search, batch = args.search[0], args.batch[0]
    model, encoded = _model(args)
    row = _rows(args, search)[args.rss or args.compile_one]
    figure = measures.memory if args.rss else measures.compiling
    return figure(row, model, encoded[batch] | options(search, args.beams), args.tokens)


def _launches(args: argparse.Namespace, console: Console) -> None:
    """Costs of a step; of rows that are compiled, their graphs."""
    deep = build("deep", args.device)
    for search, ways in _chosen(args).items():
        given, title = inputs(deep, args.batch[0]) | options(search, args.beams), f"{search}, batch {args.batch[0]}"
        compiled = {name: row for name, row in ways.items() if row.uncompiled}
        counts = {
            name: launches.of_a_step(row.generate, deep, given) for name, row in ways.items() if name not in compiled
        }
        console.print(launches.table(title, counts))
        graphs = {name: launches.graphs(row.stack, deep, given) for name, row in compiled.items() if row.stack}
        if graphs:
            console.print(launches.graphs_table(title, graphs))


def _measure(args: argparse.Namespace, console: Console) -> None:
    """Everything else, for each search and batch."""
    # then each row has a process of its own, which builds its own model
    apart = args.compiling or (args.memory and args.device == "cpu")
    model, encoded = (None, None) if apart else _model(args)
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    size = "" if model is None else f"{dry_run.count(sum(p.numel() for p in model.parameters()))} parameters, "
    console.print(
        f"{size}{args.dtype} on {args.device} ({where}), {args.tokens} tokens, transformers {transformers.__version__},"
        f" torch {torch.__version__}",
        markup=False,
        highlight=False,
    )
    speed = None if apart or args.memory or args.profile else measures.bandwidth(args.device)
    for search, ways in _chosen(args).items():
        for batch in args.batch:
            title = f"{search}{f' search, {args.beams} beams' if search == 'beam' else ''}, batch {batch}"
            ways = ways if model is None else _possible(ways, model, console)
            given = {} if encoded is None else encoded[batch] | options(search, args.beams)
            if args.profile:
                row = ways[args.profile]
                console.print(measures.profile(f"{title}, {args.profile}", row, model, given, args.tokens))
                continue
            facts = {"search": search, "batch": batch, "device": args.device, "model": args.model or args.size}
            facts |= {name: getattr(args, name) for name in ("tokens", "beams", "dtype")}
            facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
            facts |= {} if speed is None else {"bandwidth": speed}
            facts |= _found(args, search, batch, ways, model, given, title)
            console.print(tables.console(f"{title}; repeats: {args.repeats}" if speed else title, facts))
            print(json.dumps(facts), flush=True)


def _possible(ways: dict[str, Row], model, console: Console) -> dict[str, Row]:
    """The rows whose decoders can act on the model; for the others a line says why not."""
    out = {}
    for name, row in ways.items():
        refused = {} if row.stack is None else row.stack.refusals(model)
        reasons = [why for why in refused.values() if why is not None]
        if not reasons:
            out[name] = row
        for why in reasons:
            console.print(f"{name} is left out: {why}", markup=False, highlight=False)
    return out


def _found(
    args: argparse.Namespace, search: str, batch: int, ways: dict[str, Row], model, given: dict, title: str
) -> dict:
    """What was asked for, of all rows, with a bar that shows how far it is."""
    if args.compiling:
        ways = {name: row for name, row in ways.items() if row.stack is not None and row.stack.compile == "on"}
    with _progress() as bar:
        each = 1 if args.memory or args.compiling else args.repeats + 1
        task = bar.add_task(title, total=len(ways) * each)
        tick = _ticker(bar, task, title)
        if not (args.memory or args.compiling):
            return measures.measure(ways, model, given, args.tokens, args.repeats, tick)
        found = {}
        for name, row in ways.items():
            tick(name)
            if args.compiling:
                found[name] = _cold_and_warm(args, search, batch, name)
            elif model is None:
                found[name] = _apart(args, search, batch, "--rss", name)
            else:
                found[name] = measures.memory(row, model, given, args.tokens)
        return {"compiling" if args.compiling else "memory": found}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.decode", description=__doc__.split("\n\n")[1])
    _add_how(parser)
    _add_model(parser)
    _add_rows(parser)
    _add_measures(parser)
    return _checked(parser, parser.parse_args(argv))


def _add_how(parser: argparse.ArgumentParser) -> None:
    """How is generated: searches, batches, tokens."""
    parser.add_argument(
        "--search",
        nargs="+",
        choices=("greedy", "beam", "sampling"),
        default=["greedy", "beam"],
        help="default: greedy beam",
    )
    parser.add_argument("--batch", type=_count, nargs="+", default=[1], help="images at once; default: 1")
    parser.add_argument(
        "--tokens", type=_count, default=64, help="new tokens that are timed, after the first; default: %(default)s"
    )
    parser.add_argument("--repeats", type=_count, default=5, help="default: %(default)s")
    parser.add_argument("--beams", type=_count, default=5, help="default: %(default)s")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and where it runs."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=SIZES, default="110m", help="the random model; default: %(default)s")
    which.add_argument(
        "--model", metavar="NAME", help="a model of conf/model at full size with random weights, in place of --size"
    )
    parser.add_argument("--visual", type=_count, help="visual tokens of --size, a square; default: 576 (110m)")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of --model; default: %(default)s")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Which ways of decoding are compared: the rows of the table."""
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these rows, with or without brackets, and transformers; default: all"
    )
    parser.add_argument(
        "--stacks",
        nargs="+",
        metavar="STACK",
        help=f"as [opera,prunehal], of any decoders; all: each alone; default: {' '.join(STACKS)}",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="NAME.OPTION=VALUE",
        default=[],
        help="options of decoders, else those of conf/decoder",
    )
    graphs = "also run each stack compiled, on a GPU also captured, and transformers with a static cache"
    parser.add_argument("--compile", action="store_true", help=graphs)
    parser.add_argument(
        "--peer", choices=peers.PEERS, help="also run this library's methods, on the same model; it must be installed"
    )


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """What is measured in place of time."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory in place of time; on a CPU, each row in a process of its own",
    )
    what.add_argument(
        "--profile", metavar="NAME", help="show where the time of one row goes, in place of the rows' time"
    )
    what.add_argument(
        "--launches",
        action="store_true",
        help="count kernels and questions to the device a step, and graphs with --compile, on a model of 32 small"
        " layers, in place of time",
    )
    what.add_argument(
        "--compiling",
        action="store_true",
        help="measure seconds of compiling in place of time, in new processes: with no graph on disk, and with those"
        " that the first left",
    )
    for one in ("--rss", "--compile-one"):  # one row's memory or compiling, in a process of its own
        what.add_argument(one, metavar="NAME", help=argparse.SUPPRESS)


def _checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with names of rows in full; ends the program where they cannot be."""
    args.compile = args.compile or args.compiling or bool(args.compile_one)
    if args.visual and math.isqrt(args.visual) ** 2 != args.visual:
        parser.error(f"--visual: a picture has a square of patches; the nearest is {round(args.visual**0.5) ** 2}")
    if args.visual and args.model:
        parser.error("--visual is for --size; a model of conf/model has as many visual tokens as its processor makes")
    if "beam" in args.search and args.beams < 2:
        parser.error("--beams: beam search has at least 2")
    if not args.device.startswith("cuda") and args.device != "cpu":
        parser.error(f"--device: cpu or cuda, not {args.device}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("--device: torch finds no GPU here")
    if args.memory and args.device == "cpu" and not Path("/proc/self/status").exists():
        parser.error("--memory on a CPU reads /proc, which only Linux has")
    try:
        every = [_rows(args, search) for search in args.search]
    except peers.MissingPeerError as error:
        parser.error(f"--peer: {error}")
    except (InputError, StackError) as error:
        parser.error(f"--stacks, --set: {error}")
    known = list(dict.fromkeys(name for ways in every for name in ways))

    def full(name: str) -> str:
        for each in (name, f"[{name}]"):
            if each in known:
                return each
        parser.error(f"no row is called {name!r}; there are {', '.join(known)}")

    if args.peer == "mitigv" and "beam" in args.search and max(args.batch) > 1 and not args.only:
        parser.error("--peer: mitigv's OPERA runs one image at a time; take --batch 1, or name rows with --only")
    if args.model:
        try:
            models.entry(args.model)
        except InputError as error:
            parser.error(f"--model: {error}")
    args.only = args.only and [full(name) for name in args.only]
    args.profile = args.profile and full(args.profile)
    args.rss = args.rss and full(args.rss)
    args.compile_one = args.compile_one and full(args.compile_one)
    return args


def _model(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[int, dict]]:
    """The model that was asked for, and its inputs by batch."""
    if args.model is None:
        model = build(args.size, args.device, getattr(torch, args.dtype), args.visual)
        return model, {batch: inputs(model, batch) for batch in args.batch}
    try:
        return full_size(args.model, args.device, args.dtype, args.attention, args.batch)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _rows(args: argparse.Namespace, search: str) -> dict[str, Row]:
    """All that can be asked for."""
    stacks = alone() if args.stacks == ["all"] else [f"[{name.strip('[]')}]" for name in args.stacks or STACKS]
    capture = args.compile and args.device != "cpu"
    return rows(search, args.beams, args.compile, args.peer, capture, stacks, args.set)


def _chosen(args: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """The rows that were asked for, by search; transformers' own first. Searches that have none are left out."""
    wanted = [args.profile] if args.profile else args.only
    out = {}
    for search in dict.fromkeys(args.search):
        ways = _rows(args, search)
        base = next(iter(ways))
        if wanted is None or any(name in ways for name in wanted):
            out[search] = {name: row for name, row in ways.items() if wanted is None or name in (base, *wanted)}
    return out


def _ticker(bar: Progress, task: TaskID, title: str) -> Callable[[str], None]:
    """A function that is called with the name of each measurement as it begins, and counts the one before as done."""
    begun = False

    def tick(name: str) -> None:
        nonlocal begun
        bar.update(task, description=escape(f"{title}: {name}"), advance=int(begun))
        begun = True

    return tick


def _apart(
    args: argparse.Namespace, search: str, batch: int, figure: str, name: str, environment: dict[str, str] | None = None
) -> dict:
    """What the hidden option `figure` measures of one row, in a process of its own."""
    same = ("tokens", "beams", "device", "dtype", "attention", "model" if args.model else "size")
    command = [
        sys.executable,
        "-m",
        "experiments.bench.decode",
        figure,
        name,
        "--search",
        search,
        "--batch",
        str(batch),
    ]
    command += ["--visual", str(args.visual)] if args.visual else []
    command += ["--peer", args.peer] if args.peer else []
    command += ["--compile"] if args.compile else []
    command += ["--stacks", *args.stacks] if args.stacks else []
    command += ["--set", *args.set] if args.set else []
    for key in same:
        command += [f"--{key}", str(getattr(args, key))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _cold_and_warm(args: argparse.Namespace, search: str, batch: int, name: str) -> dict[str, float]:
    """Seconds of compiling in two processes, the second of which finds on disk what the first left; graphs made."""
    with tempfile.TemporaryDirectory() as folder:
        where = {"TORCHINDUCTOR_CACHE_DIR": folder}
        cold, warm = (_apart(args, search, batch, "--compile-one", name, where) for _ in range(2))
    return {"cold": cold["seconds"], "warm": warm["seconds"], "graphs": cold["graphs"]}


def _progress() -> Progress:
    columns: Iterable = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    main()
