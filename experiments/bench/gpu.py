"""What a machine with a GPU can tell in nine minutes: `python -m experiments.bench.gpu`, or `make gpu`.

It first says what is missing. Then it runs, each part in a process of its own with a time limit: the checks of every
decoder and search on the device (tests/device/checks.py), in float32, in half precision, and some compiled and captured
as CUDA graphs; then the speed of every stack on a model of full size with random weights (experiments.bench.decode),
with few rows, with many, compiled and captured. After each part the results so far are written to OUT/gpu.json, and
what the part printed to OUT/PART.log. No network is used, and nothing is installed. `--table FILE` prints the tables of
such a gpu.json as markdown.

It ends with exit status 0, with 1 if a part failed or ran out of time, and with 2 if something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDS = (
    "torch",
    "transformers",
    "einops",
    "hydra-core",
    "omegaconf",
    "pillow",
    "jinja2",
    "rich",
    "pytest",
    "hypothesis",
)
LEAST_MEMORY = 40  # GB of the GPU that llava15_7b needs at the batches below


@dataclass
class Part:
    """One process: its arguments, what is set in its environment, and its limit in seconds."""

    name: str
    arguments: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As it would be typed."""
        return shlex.join([*(f"{k}={v}" for k, v in self.environment.items()), "python", *self.arguments])


def parts(device: str, size: str) -> list[Part]:
    """All parts, in order; `size` is `full` for llava15_7b, or one of the random models of experiments.bench.decode."""
    out = []
    for dtype, limit in (("float32", 80), ("bfloat16", 50)):
        checks = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/device/checks.py"]
        out.append(Part(f"checks-{dtype}", checks, limit, {"DEVICE": device, "DTYPE": dtype}))
    some = ["-k", "llava and (greedy or beam)"] if size == "full" else ["-k", "llava and opera-prunehal and greedy"]
    checks = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/device/checks.py", *some]
    for name, mode, limit in (("checks-compiled", "on", 80), ("checks-captured", "captured", 40)):
        if mode == "on" or device != "cpu":
            out.append(Part(name, checks, limit, {"DEVICE": device, "DTYPE": "float32", "COMPILE": mode}))
    model = ["--model", "llava15_7b", "--dtype", "bfloat16"] if size == "full" else ["--size", size]
    amount = ["--tokens", "32", "--repeats", "3"] if size == "full" else ["--tokens", "2", "--repeats", "1"]
    base = ["-m", "experiments.bench.decode", "--device", device, *model, *amount]
    many = "16" if size == "full" else "2"
    out.append(Part("speed-1", [*base, "--search", "greedy", "beam", "--batch", "1"], 110))
    out.append(Part(f"speed-{many}", [*base, "--search", "greedy", "--batch", many], 70))
    kinds = ("", " compiled") if device == "cpu" else ("", " compiled", " captured")
    chosen = ["--only", "transformers static", *(name + kind for name in ("[]", "[prunehal]") for kind in kinds)]
    graphs = ["--compile", *chosen, "--search", "greedy", "--batch", "1"]
    out.append(Part("speed-compiled", [*base, *graphs], 105))
    return out


def missing(device: str, size: str) -> list[str]:
    """What is needed and not there, a line each."""
    found = []
    for name in NEEDS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"the package {name}: pip install {name}")
    if found:
        return found
    import torch

    if device == "cpu":
        return []
    if not torch.cuda.is_available():
        return [f"a GPU: torch {torch.__version__} finds none (its CUDA: {torch.version.cuda}); or --device cpu"]
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    if size == "full" and memory < LEAST_MEMORY:
        return [f"memory: the GPU has {memory:.0f} GB, llava15_7b needs about {LEAST_MEMORY}; or --size 110m"]
    return []


def machine(device: str) -> dict[str, str | int]:
    """What the results were made with."""
    import torch
    import transformers

    cuda = device != "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda or "none",
    }


def run(part: Part, out: Path, limit: float) -> dict:
    """Run one part, for at most `limit` seconds, and tell how it went."""
    log, begin = out / f"{part.name}.log", time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(limit) == 0 else f"failed with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s, its limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return {
        "part": part.name,
        "command": part.line,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "results": [json.loads(line) for line in lines if line.startswith("{")],
        "end": [line for line in lines if line.strip() and not line.startswith("{")][-3:],
    }


def tables(told: dict) -> str:
    """The results as markdown."""
    about = told["machine"]
    out = [
        f"{about['device']}, {about['cores']} CPU cores, Python {about['python']}, torch {about['torch']}"
        f" (CUDA {about['cuda']}), transformers {about['transformers']}.",
        "",
        "| part | status | seconds |",
        "|---|---|---|",
        *(
            f"| `{one['command']}` | {one['status']}: {one['end'][-1] if one['end'] else ''} | {one['seconds']} |"
            for one in told["parts"]
        ),
    ]
    for facts in (facts for one in told["parts"] for facts in one["results"]):
        from .tables import markdown  # not at the top: what is missing is said first

        out += ["", markdown(facts)]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.table:
        print(tables(json.loads(args.table.read_text())))
        return 0
    lacking = missing(args.device, args.size)
    for line in lacking:
        print(f"missing: {line}", file=sys.stderr)
    if lacking:
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine(args.device), "parts": []}
    print(", ".join(f"{k} {v}" for k, v in told["machine"].items()), flush=True)
    if args.device == "cpu":
        print("checks-captured: left out, CUDA graphs need a GPU", flush=True)
    todo, end = parts(args.device, args.size), time.monotonic() + 60 * args.minutes
    for i, part in enumerate(todo, 1):
        left = end - time.monotonic()
        if left < 10:
            print(f"{part.name}: left out, the {args.minutes:g} minutes are over", flush=True)
            told["parts"].append({"part": part.name, "command": part.line, "status": "left out", "seconds": 0.0})
            told["parts"][-1] |= {"results": [], "end": []}
        else:
            print(f"{i} of {len(todo)}, at most {min(part.limit, left):.0f} s: {part.line}", flush=True)
            told["parts"].append(run(part, args.out, min(part.limit, left)))
            one = told["parts"][-1]
            print(f"{part.name}: {one['status']} in {one['seconds']} s", *one["end"], sep="\n  ", flush=True)
        partial = args.out / "gpu.json.part"
        partial.write_text(json.dumps(told, indent=1))
        partial.replace(args.out / "gpu.json")
    print(tables(told))
    return int(any(one["status"] != "passed" for one in told["parts"]))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.gpu", description=__doc__.split("\n\n")[1])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--size",
        choices=("full", "110m", "tiny"),
        default="full",
        help="the model whose speed is measured: llava15_7b with random weights, or a small one; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together; default: %(default)s")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a gpu.json and do nothing else")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
