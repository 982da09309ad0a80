"""Two checkouts of this repository, side by side: `python -m experiments.bench.paired --old FOLDER`.

Each checkout runs in a process of its own, with the same random LLaVA (110 M parameters). The processes take turns, so
that both see the same machine; ratios are taken within a turn, and medians over turns. Decode ms a step: two lengths
are subtracted, so that the prompt does not count. Transformers' own `generate` runs in the new checkout's process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
INPUTS = "inputs.safetensors"
ROWS = {  # name: (decoders, beams); None is transformers' own
    "transformers": (None, 1),
    "[]": ((), 1),
    "[prunehal]": (("prunehal",), 1),
    "[vcd]": (("vcd",), 1),
    "[opera]": (("opera",), 1),
    "transformers beam-5": (None, 5),
    "[] beam-5": ((), 5),
    "[prunehal] beam-5": (("prunehal",), 5),
    "[opera] beam-5": (("opera",), 5),
    "[opera,prunehal] beam-5": (("opera", "prunehal"), 5),
}


def serve(folder: str, threads: int) -> None:
    """In a checkout: build the model of the config and take the inputs in `folder`; then read rows and lengths as lines
    of JSON, run them, and write the seconds.
    """
    import time

    import torch
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from baselines import OPERA, VCD
    from decoders import Stack
    from prunehal import PruneHal

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    given = load_file(f"{folder}/{INPUTS}")
    make = {"prunehal": lambda: PruneHal(r=0.4, t=3), "vcd": VCD, "opera": lambda: OPERA(threshold=None)}
    print("ready", flush=True)
    for line in sys.stdin:
        names, beams, tokens = json.loads(line)
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=beams)
        began = time.perf_counter()
        if names is None:
            model.generate(**given, **options)
        else:
            Stack([make[name]() for name in names]).generate(model, **given, **options)
        print(json.dumps(time.perf_counter() - began), flush=True)


def _write(folder: Path, size: str, visual: int, batch: int) -> None:
    """What both checkouts run: a config, and inputs."""
    import torch
    from safetensors.torch import save_file

    from . import ways

    config = ways.config(size, visual)
    config.save_pretrained(folder)
    given = ways.inputs(SimpleNamespace(config=config, device="cpu", dtype=torch.float32), batch)
    save_file({name: value.contiguous() for name, value in given.items()}, folder / INPUTS)


class Checkout:
    """A process that runs in a checkout."""

    def __init__(self, folder: Path, arguments: list[str]):
        here = str(Path(__file__))
        code = f"exec(compile(open({here!r}).read(), {here!r}, 'exec'), dict(__name__='__main__', __file__={here!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"the checkout {folder} does not run; its error stands above")

    def step(self, row: str, lengths: tuple[int, int]) -> float:
        """Decode ms a step of a row."""
        took = []
        for tokens in lengths:
            print(json.dumps([*ROWS[row], tokens]), file=self.process.stdin, flush=True)
            took.append(json.loads(self.process.stdout.readline()))
        return 1e3 * (took[1] - took[0]) / (lengths[1] - lengths[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.paired", description=__doc__.split("\n\n")[1])
    parser.add_argument("--old", type=Path, help="the other checkout")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--visual", type=int, default=576, help="visual tokens, a square; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="images; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="turns; default: %(default)s")
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 28), help="the two lengths; default: 4 28")
    parser.add_argument("--threads", type=int, default=2, help="of each process; default: %(default)s")
    parser.add_argument("--size", choices=("110m", "tiny"), default="110m", help="of the model; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write what was measured there")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads)
    if args.old is None or not (args.old / "decoders").is_dir():
        parser.error("--old names a checkout of this repository")
    if math.isqrt(args.visual) ** 2 != args.visual:
        parser.error(f"--visual: a picture has a square of patches; the nearest is {round(args.visual**0.5) ** 2}")
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), args.size, args.visual, args.batch)
        given = ["--serve", folder, "--threads", str(args.threads)]
        old, new = Checkout(args.old.resolve(), given), Checkout(ROOT, given)
    times: dict[str, dict[str, list[float]]] = {row: {"old": [], "new": []} for row in args.rows}
    for turn in track(range(args.repeats + 1), "turns", console=Console(stderr=True)):
        for row in args.rows:
            sides = {"new": new} if row.startswith("transformers") else {"old": old, "new": new}
            for side, checkout in (sides if turn % 2 else dict(reversed(sides.items()))).items():
                took = checkout.step(row, tuple(args.tokens))
                if turn:  # the first turn warms up
                    times[row][side].append(took)
    table = Table("row", "old ms", "new ms", "new / old", "new / transformers", title=f"{args.batch} images")
    for row, both in times.items():
        mine = f"transformers{row.partition(' ')[2] and ' beam-5'}"
        cells = [f"{statistics.median(both[side]):.1f}" if both[side] else "" for side in ("old", "new")]
        for other in (both["old"], times.get(mine, {}).get("new", [])):
            ratios = [a / b for a, b in zip(both["new"], other, strict=False)]
            spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
            cells.append(f"{statistics.median(ratios):.2f}{spread}" if ratios else "")
        table.add_row(escape(row), *cells)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "old": str(args.old), "json": ""}, "ms": times}))


if __name__ == "__main__":
    main()
