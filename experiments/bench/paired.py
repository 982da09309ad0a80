"""Two checkouts of this repository, side by side: `python -m experiments.bench.paired --old FOLDER`.

Each checkout runs in a process of its own, with the same random LLaVA (110 M parameters). The processes take turns, so
that both see the same machine; ratios are taken within a turn, and medians over turns. Decode ms a step: two lengths
are subtracted, so that the prompt does not count. Transformers' own `generate` runs in the new checkout's process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
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


def serve(visual: int, batch: int, threads: int, hidden: int) -> None:
    """In a checkout: read rows and lengths as lines of JSON, run them, and write the seconds and the peak memory."""
    import time

    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from baselines import OPERA, VCD
    from decoders import Stack
    from prunehal import PruneHal

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    side = round(visual**0.5)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=31999,
        vision_feature_layer=-1,
        image_seq_length=side**2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    g = torch.Generator().manual_seed(1)
    before, after = (torch.randint(3, 31999, (batch, n), generator=g) for n in (6, 14))
    ids = torch.cat([before, torch.full((batch, side**2), 31999), after], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = torch.randn(batch, 3, 14 * side, 14 * side, generator=g)
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


class Checkout:
    """A process that runs in a checkout."""

    def __init__(self, folder: Path, arguments: list[str]):
        here = str(Path(__file__))
        code = f"exec(compile(open({here!r}).read(), {here!r}, 'exec'), dict(__name__='__main__', __file__={here!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "--serve", *arguments],
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
    parser.add_argument("--hidden", type=int, default=768, help="width of the model, a multiple of 24; default: 768")
    parser.add_argument("--json", type=Path, help="also write what was measured there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.visual, args.batch, args.threads, args.hidden)
    if args.old is None or not (args.old / "decoders").is_dir():
        parser.error("--old names a checkout of this repository")
    given = [f"--{name}={getattr(args, name)}" for name in ("visual", "batch", "threads", "hidden")]
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
