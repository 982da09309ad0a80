"""What the benchmark measures of a way to decode: time, what a step reads, memory, compiling, operators."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from decoders import hf

from . import tables
from .ways import Row


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
class Traffic:
    """Of a generation: forwards that were run, and bytes of keys and values that attention was given."""

    forwards: int = 0
    cache: int = 0
    layer: int | None = None  # the first that keeps keys, which stands for a forward


@contextmanager
def _traffic():
    """Within, what caches are asked for is counted in the `Traffic` yielded."""
    found, real = Traffic(), transformers.Cache.update

    def update(cache, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = real(cache, key_states, value_states, layer_idx, *args, **kwargs)
        found.layer = layer_idx if found.layer is None else found.layer
        found.forwards += layer_idx == found.layer
        found.cache += keys.nbytes + values.nbytes
        return keys, values

    with mock.patch.object(transformers.Cache, "update", update):
        yield found


def weights(model) -> int:
    """Bytes of the weights that a token takes: of the language model's blocks and the output embeddings."""
    parts = (*hf.blocks(model), hf.output_embeddings(model))
    return sum({id(p): p.nbytes for part in parts for p in part.parameters()}.values())


def reads(row: Row, model, given: dict, tokens: int) -> float:
    """Bytes that a step of a way to decode reads, run uncompiled: the weights in each forward, and the keys and values
    that attention is given. The prompt is subtracted.
    """
    found = []
    for new in (1, 1 + tokens):
        with _traffic() as traffic:
            row.generate(model, **given, **row.uncompiled, max_new_tokens=new)
        found.append(traffic)
    forwards, cache = (getattr(found[1], name) - getattr(found[0], name) for name in ("forwards", "cache"))
    return (forwards * weights(model) + cache) / tokens


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
    """Seconds a token and of one token, rollbacks, seconds of compiling (first those of the warm-up) and bytes that a
    step reads, by row: {figure: {name: [a repeat]}}, of the last {name: bytes}; on a GPU `memory` as well.
    """
    out: dict = {figure: {name: [] for name in ways} for figure in ("decode", "prefill", "rollbacks", "compile")}
    out["read"] = {}
    for name, row in ways.items():
        tick(f"warming up {name}")
        out["read"][name] = reads(row, model, given, tokens)
        seconds(row, model, given, 1 + tokens if row.uncompiled else min(4, tokens))
        _note(out, name, row)
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(ways), len(ways)):
            tick(name)
            first = seconds(ways[name], model, given, 1)
            both = seconds(ways[name], model, given, 1 + tokens)
            out["prefill"][name].append(first)
            out["decode"][name].append((both - first) / tokens)
            _note(out, name, ways[name])
            if ways[name].stack is not None and "opera" in ways[name].stack.record:
                out["rollbacks"][name].append(
                    sum(len(image["rollbacks"]) for image in ways[name].stack.record["opera"])
                )
    if model.device.type == "cuda":
        out["memory"] = {name: memory(row, model, given, tokens) for name, row in ways.items()}
    return out


def _note(out: dict, name: str, row: Row) -> None:
    """Keep what the newest generation spent on compiling."""
    if row.stack is not None and row.stack.compiled is not None:
        out["compile"][name].append(row.stack.compiled["seconds"])


def compiling(row: Row, model, given: dict, tokens: int) -> dict[str, float]:
    """Seconds that the first generation of this process spends on compiling, and how many graphs it makes."""
    seconds(row, model, given, 1 + tokens)
    assert row.stack is not None and row.stack.compiled is not None
    return row.stack.compiled


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
    columns = ["operator", "calls/token", f"self {kind} ms/token", "share", *["self CPU ms/token"] * cuda]
    lines = [
        [
            key,
            f"{figures[0]:.1f}",
            f"{figures[which] / 1e3:.3f}",
            f"{figures[which] / whole:.1%}",
            *[f"{figures[1] / 1e3:.3f}"] * cuda,
        ]
        for key, figures in sorted(total.items(), key=lambda item: -item[1][which])[:15]
    ]
    title = f"{title}: {1e3 * plain:.2f} ms/token unprofiled; {whole / 1e3:.2f} ms of self {kind} time profiled"
    return tables.listing(title, columns, lines)


def _resident(key: str) -> int:
    """Bytes of memory of this process, now (VmRSS) or at most (VmHWM). The latter, unlike getrusage, leaves out the
    process that started it.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
