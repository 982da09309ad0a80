"""What decoding costs: `python -m experiments.bench.decode`.

Decode ms per token of stacks against transformers' own `generate` with the same search, on a randomly initialised LLaVA
of about 110 M parameters with 576 visual tokens, or on a model of `conf/model` at full size with random weights
(`--model`). Two lengths are subtracted, so that prefill does not count; it is reported beside. Every repeat runs all
rows one after the other, in changing order; ratios are taken within a repeat, and medians over repeats. No token ends
an answer. `--memory`, `--profile` and `--launches` measure memory, where the time goes, and kernels a
step, in place of time.

With beams, `opera by C+1 forwards` is what OPERA costs when each candidate is run and thrown away, as in its official
code. That row never goes back; `[opera]` does when its threshold is passed, and the column `rollbacks` says how often
it did.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from rich import box
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
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from baselines import OPERA, VCD, DeCo, DoLa
from decoders import Stack
from experiments import dry, models
from experiments.errors import InputError
from prunehal import PruneHal

from . import launches, sequential

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "110m": dict(vocab=32000, hidden=768, inner=2048, layers=12, heads=12, pixels=336),
    "tiny": dict(vocab=300, hidden=32, inner=64, layers=4, heads=2, pixels=84),
    "deep": dict(vocab=300, hidden=32, inner=64, layers=32, heads=2, pixels=84),  # for --launches
}
PATCH = 14
MiB = 2**20


def config(size: str, visual: int | None = None) -> LlavaConfig:
    """Of a LLaVA of one of `SIZES`, whose last token id stands for the image; `visual` tokens, a square, if given."""
    s = SIZES[size]
    side = s["pixels"] // PATCH if visual is None else math.isqrt(visual)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=s["vocab"] - 1,
        vision_feature_layer=-1,
        image_seq_length=side**2,
        tie_word_embeddings=True,
    )


def build(
    size: str = "110m", device: str = "cpu", dtype: torch.dtype = torch.float32, visual: int | None = None
) -> LlavaForConditionalGeneration:
    """A random LLaVA of one of `SIZES`, with so many visual tokens if given, whose answers nothing ends."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(size, visual)).to(device, dtype).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def inputs(model: LlavaForConditionalGeneration, batch: int) -> dict:
    """Prompts of the model's visual tokens and 20 others, and noise for pictures."""
    g = torch.Generator().manual_seed(1)
    image, visual, pixels = (
        model.config.image_token_id,
        model.config.image_seq_length,
        model.config.vision_config.image_size,
    )
    before, after = (torch.randint(3, image, (batch, n), generator=g) for n in (6, 14))
    ids = torch.cat([before, torch.full((batch, visual), image), after], 1).to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, pixels, pixels, generator=g).to(model.device, model.dtype),
    }


def full_size(
    name: str, device: str, dtype: str, attention: str, batch: Sequence[int]
) -> tuple[torch.nn.Module, dict[int, dict]]:
    """A `conf/model` entry with random weights, whose answers nothing ends, and inputs by batch: a picture of noise,
    640 x 480, with the entry's prompt.
    """
    torch.manual_seed(0)
    entry = models.entry(name)
    entry.update({"weights": "random", "device": device, "dtype": dtype, "attn_implementation": attention})
    model, processor = models.load(entry)
    model.generation_config.update(eos_token_id=None, pad_token_id=model.generation_config.pad_token_id or 0)
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    given = {}
    for b in batch:
        encoded = models.encode(processor, [picture] * b, entry.prompt, model.device, models.template(entry))
        given[b] = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in encoded.items()}
    return model, given


def bandwidth(device: str) -> float:
    """Bytes a second that the device's memory moves, the best of ten copies of 1 GiB (256 MiB on a CPU)."""
    size = 2**28 if device == "cpu" else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        if device != "cpu":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - begin))
    return best


@dataclass
class Row:
    """One way to decode: a function that takes the model and what `model.generate` takes; and the stack that it is of,
    if any.
    """

    generate: Callable
    stack: Stack | None = None


def rows(search: str, beams: int, compile: bool = False) -> dict[str, Row]:
    """All ways to decode under a search, by name; the first is what the others are measured against.

    Args:
        compile: whether each stack is also run compiled, and transformers with its static cache, which it compiles on a
            GPU (under beams it has none).
    """
    stacks = {
        "[]": [],
        "[prunehal]": [PruneHal(r=0.4, t=3)],
        "[vcd]": [VCD()],
        "[dola]": [DoLa()],
        "[deco]": [DeCo()],
        "[opera]": [OPERA()],
        "[opera,prunehal]": [OPERA(), PruneHal(r=0.4, t=3)],
    }
    if search != "beam":
        stacks["[vcd,prunehal]"] = [VCD(), PruneHal(r=0.4, t=3)]
    out = {
        f"transformers beam-{beams}" if search == "beam" else "transformers": Row(
            lambda model, **given: model.generate(**given)
        )
    }
    if compile and search != "beam":
        out["transformers static"] = Row(lambda model, **given: model.generate(**given, cache_implementation="static"))
    for name, decoders in stacks.items():
        stack = Stack(decoders)
        out[name] = Row(stack.generate, stack)
        if compile:
            graph = Stack(decoders, compile="on")
            out[f"{name} compiled"] = Row(graph.generate, graph)
    if search == "beam":
        out["opera by C+1 forwards"] = Row(sequential.opera)
    return out


def options(search: str, beams: int) -> dict:
    """What `generate` takes for a search."""
    return {
        "greedy": dict(do_sample=False),
        "sampling": dict(do_sample=True),
        "beam": dict(do_sample=False, num_beams=beams),
    }[search]


def seconds(row: Row, model, given: dict, tokens: int) -> float:
    """Time of one generation of so many new tokens."""
    torch.manual_seed(0)  # the same draws under sampling
    _wait(model)
    begin = time.perf_counter()
    ids = row.generate(model, **given, max_new_tokens=tokens)
    _wait(model)
    taken = time.perf_counter() - begin
    expected = (len(given["input_ids"]), given["input_ids"].shape[1] + tokens)
    if tuple(ids.shape) != expected:
        raise RuntimeError(f"the answer is {tuple(ids.shape)}, not {expected}: the time would mean nothing")
    return taken


def measure(ways: dict[str, Row], model, given: dict, tokens: int, repeats: int, tick: Callable[[str], None]) -> dict:
    """Seconds a token and of one token, rollbacks, and seconds of compiling (first those of the warm-up), by row:
    {figure: {name: [a repeat]}}.
    """
    out = {figure: {name: [] for name in ways} for figure in ("decode", "prefill", "rollbacks", "compile")}
    for name, row in ways.items():
        tick(f"warming up {name}")
        seconds(row, model, given, 1 + tokens if name.endswith("compiled") else min(4, tokens))
        if row.stack is not None and row.stack.compiled is not None:
            out["compile"][name].append(row.stack.compiled["seconds"])
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(ways), len(ways)):
            tick(name)
            first = seconds(ways[name], model, given, 1)
            both = seconds(ways[name], model, given, 1 + tokens)
            out["prefill"][name].append(first)
            out["decode"][name].append((both - first) / tokens)
            if ways[name].stack is not None and ways[name].stack.compiled is not None:
                out["compile"][name].append(ways[name].stack.compiled["seconds"])
            if ways[name].stack is not None and "opera" in ways[name].stack.record:
                out["rollbacks"][name].append(
                    sum(len(image["rollbacks"]) for image in ways[name].stack.record["opera"])
                )
    return out


def table(title: str, found: dict, floor: float) -> Table:
    """Medians of what `measure` found, and the lowest and highest ratio of a repeat; `floor`: seconds in which the
    weights can be read once.
    """
    out = _table(
        title,
        "",
        "ms a token",
        "of the floor",
        "ratio",
        "spread",
        "prefill ms",
        "its ratio",
        "rollbacks",
        "compiled in s",
    )
    base = next(iter(found["decode"]))
    for name in found["decode"]:
        ratios, before = (
            [a / b for a, b in zip(found[figure][name], found[figure][base], strict=False)]
            for figure in ("decode", "prefill")
        )
        decode, prefill = (1e3 * statistics.median(found[figure][name]) for figure in ("decode", "prefill"))
        back = " ".join(str(n) for n in sorted(set(found["rollbacks"][name])))
        out.add_row(
            escape(name),
            f"{decode:.2f}",
            f"{decode / (1e3 * floor):.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{prefill:.0f}",
            f"{statistics.median(before):.3f}",
            back or "-",
            f"{sum(found['compile'][name]):.0f}" if found["compile"].get(name) else "-",
        )
    return out


def memory(row: Row, model, given: dict, tokens: int) -> dict[str, int]:
    """Bytes held before a generation, and at most during it: of the GPU, or of this process."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(row, model, given, 1 + tokens)
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    with suppress(OSError):  # forget the peak of building the model, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    seconds(row, model, given, 1 + tokens)
    return {"before": before, "peak": _resident("VmHWM")}


def memory_table(title: str, found: dict[str, dict[str, int]]) -> Table:
    """What `memory` found, by row; the generation's own share is the peak without what was held before."""
    out = _table(title, "", "peak MiB", "ratio", "generation's own MiB", "ratio of it")
    base = next(iter(found.values()))
    for name, each in found.items():
        own, of = each["peak"] - each["before"], base["peak"] - base["before"]
        out.add_row(
            escape(name),
            f"{each['peak'] / MiB:.0f}",
            f"{each['peak'] / base['peak']:.3f}",
            f"{own / MiB:.1f}",
            f"{own / of:.3f}" if of else "-",
        )
    return out


def profile(title: str, row: Row, model, given: dict, tokens: int) -> Table:
    """The 15 operators that take most time of a token, prefill subtracted."""
    cuda = model.device.type == "cuda"
    seconds(row, model, given, min(4, tokens))
    plain = (seconds(row, model, given, 1 + tokens) - seconds(row, model, given, 1)) / tokens
    total: dict[str, list[float]] = {}  # calls, microseconds on the CPU, on the GPU
    for sign, new in ((-1, 1), (1, 1 + tokens)):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as run:
            seconds(row, model, given, new)
        for event in run.key_averages():
            if event.device_type == DeviceType.CPU:
                figures = (event.count, event.self_cpu_time_total, event.self_device_time_total if cuda else 0.0)
                total[event.key] = [
                    a + sign * b / tokens for a, b in zip(total.get(event.key, [0.0] * 3), figures, strict=False)
                ]
    which = 2 if cuda else 1
    whole = sum(figures[which] for figures in total.values())
    kind = "CUDA" if cuda else "CPU"
    out = _table(
        f"{title}: {1e3 * plain:.2f} ms/token unprofiled; {whole / 1e3:.2f} ms of self {kind} time profiled",
        "operator",
        "calls/token",
        f"self {kind} ms/token",
        "share",
        *["self CPU ms/token"] * cuda,
    )
    for key, figures in sorted(total.items(), key=lambda item: -item[1][which])[:15]:
        out.add_row(
            escape(key),
            f"{figures[0]:.1f}",
            f"{figures[which] / 1e3:.3f}",
            f"{figures[which] / whole:.1%}",
            *[f"{figures[1] / 1e3:.3f}"] * cuda,
        )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    console = Console(width=max(96, Console().width))  # what the tables need
    if args.rss:
        search, batch = args.search[0], args.batch[0]
        model, encoded = _model(args)
        print(
            json.dumps(
                memory(
                    rows(search, args.beams)[args.rss], model, encoded[batch] | options(search, args.beams), args.tokens
                )
            )
        )
        return
    if args.launches:
        deep = build("deep", args.device)
        for search, ways in _chosen(args).items():
            given = inputs(deep, args.batch[0]) | options(search, args.beams)
            counts = {name: launches.of_a_step(row.generate, deep, given) for name, row in ways.items()}
            console.print(launches.table(f"{search}, batch {args.batch[0]}", counts))
        return
    apart = args.memory and args.device == "cpu"  # then each row has a process of its own, which builds its own model
    model, encoded = (None, None) if apart else _model(args)
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    size = "" if apart else f"{dry.count(sum(p.numel() for p in model.parameters()))} parameters, "
    console.print(
        f"{size}{args.dtype} on {args.device} ({where}), {args.tokens} tokens, transformers {transformers.__version__},"
        f" torch {torch.__version__}",
        markup=False,
        highlight=False,
    )
    floor = None
    if not apart and not args.memory and not args.profile:
        speed = bandwidth(args.device)
        floor = sum(p.numel() * p.element_size() for p in model.parameters()) / speed
        console.print(
            f"reading every weight once takes {1e3 * floor:.2f} ms at the bandwidth of a copy, {speed / 1e9:.0f} GB/s;"
            " no token of one row can be faster",
            highlight=False,
        )
    for search, ways in _chosen(args).items():
        for batch in args.batch:
            title = (
                f"{search} search, {args.beams} beams, batch {batch}"
                if search == "beam"
                else f"{search}, batch {batch}"
            )
            facts = {
                "search": search,
                "batch": batch,
                "tokens": args.tokens,
                "beams": args.beams,
                "dtype": args.dtype,
                "device": args.device,
                "model": args.model or args.size,
                "floor": floor,
            }
            given = {} if apart else encoded[batch] | options(search, args.beams)
            if args.profile:
                console.print(profile(f"{title}, {args.profile}", ways[args.profile], model, given, args.tokens))
                continue
            with _progress() as bar:
                task = bar.add_task(title, total=len(ways) * (1 if args.memory else args.repeats + 1))
                tick = _ticker(bar, task, title)
                if args.memory:
                    found = {}
                    for name, row in ways.items():
                        tick(name)
                        found[name] = (
                            _apart(args, search, batch, name) if apart else memory(row, model, given, args.tokens)
                        )
                    facts["memory"] = found
                else:
                    found = measure(ways, model, given, args.tokens, args.repeats, tick)
                    facts |= found
                bar.update(task, advance=1)
            console.print(
                memory_table(title, found) if args.memory else table(f"{title}; repeats: {args.repeats}", found, floor)
            )
            print(json.dumps(facts), flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.decode", description=__doc__.split("\n\n")[1])
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
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these rows, with or without brackets, and transformers; default: all"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also run each stack compiled, and transformers with a static cache"
    )
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
        help="count kernels and questions to the device a step, on a model of 32 small layers, in place of time",
    )
    what.add_argument("--rss", metavar="NAME", help=argparse.SUPPRESS)  # one row's memory, in a process of its own
    args = parser.parse_args(argv)
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
    known = list(dict.fromkeys(name for search in args.search for name in rows(search, args.beams, args.compile)))

    def full(name: str) -> str:
        for each in (name, f"[{name}]"):
            if each in known:
                return each
        parser.error(f"no row is called {name!r}; there are {', '.join(known)}")

    if args.model:
        try:
            models.entry(args.model)
        except InputError as error:
            parser.error(f"--model: {error}")
    args.only = args.only and [full(name) for name in args.only]
    args.profile = args.profile and full(args.profile)
    args.rss = args.rss and full(args.rss)
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


def _chosen(args: argparse.Namespace) -> dict[str, dict[str, Row]]:
    """The rows that were asked for, by search; transformers' own first. Searches that have none are left out."""
    wanted = [args.profile] if args.profile else args.only
    out = {}
    for search in dict.fromkeys(args.search):
        ways = rows(search, args.beams, args.compile)
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


def _apart(args: argparse.Namespace, search: str, batch: int, name: str) -> dict[str, int]:
    """`memory` of one row in a process of its own."""
    same = ("tokens", "beams", "device", "dtype", "attention", "model" if args.model else "size")
    command = [
        sys.executable,
        "-m",
        "experiments.bench.decode",
        "--rss",
        name,
        "--search",
        search,
        "--batch",
        str(batch),
        *(["--visual", str(args.visual)] if args.visual else []),
    ]
    for key in same:
        command += [f"--{key}", str(getattr(args, key))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(key: str) -> int:
    """Bytes of memory of this process, now (VmRSS) or at most (VmHWM). The latter, unlike getrusage, leaves out the
    process that started it.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _table(title: str, *columns: str) -> Table:
    out = Table(
        title=escape(title), box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left"
    )
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    return out


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
