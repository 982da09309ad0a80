"""What the loop costs: `python -m experiments.bench.decode`.

Decode ms per token of `Stack([])` and `[prunehal]` against transformers' own greedy generate, on a randomly initialised LLaVA
of about 100 M parameters with 576 visual tokens. Two lengths are subtracted, so that prefill does not count; it is reported beside. Every
repeat runs all of them one after the other, in changing order; ratios are taken within a repeat, and medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from decoders import Stack
from prunehal import PruneHal

IMAGE = 31999


def build(device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14)
    text = LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=4096, tie_word_embeddings=True)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1, image_seq_length=576, tie_word_embeddings=True)
    model = LlavaForConditionalGeneration(config).to(device, dtype).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def inputs(batch: int, device: str, dtype: torch.dtype) -> dict:
    g = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.randint(3, 31000, (batch, 6), generator=g), torch.full((batch, 576), IMAGE), torch.randint(3, 31000, (batch, 14), generator=g)], 1)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "pixel_values": torch.randn(batch, 3, 336, 336, generator=g).to(device, dtype)}


def seconds(generate, model, batch: dict, tokens: int) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    generate(model, **batch, max_new_tokens=tokens, do_sample=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = build(args.device, dtype)
    ways = {"transformers": lambda m, **k: m.generate(**k), "[]": Stack([]).generate, "[prunehal]": Stack([PruneHal(r=0.4, t=3)]).generate}
    console = Console()
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {args.dtype} on {args.device}, {torch.get_num_threads()} threads, {args.tokens} tokens, {args.repeats} repeats", markup=False)
    for size in args.batch:
        batch = inputs(size, args.device, dtype)
        decode, prefill = {w: [] for w in ways}, {w: [] for w in ways}
        for way in ways.values():
            seconds(way, model, batch, 4)
        for repeat in range(args.repeats):
            order = list(ways)[repeat % 3 :] + list(ways)[: repeat % 3]
            for way in order:
                first = seconds(ways[way], model, batch, 1)
                both = seconds(ways[way], model, batch, 1 + args.tokens)
                prefill[way].append(first)
                decode[way].append((both - first) / args.tokens)
        table = Table(title=f"batch {size}")
        for column in ("", "decode ms/token", "ratio", "ratios of the repeats", "prefill ms", "prefill ratio"):
            table.add_column(column, justify="right")
        for way in ways:
            pairs = [a / b for a, b in zip(decode[way], decode["transformers"])]
            ratio = statistics.median(pairs)
            before = statistics.median(a / b for a, b in zip(prefill[way], prefill["transformers"]))
            name = way.replace("[", "\\[")
            table.add_row(name, f"{1e3 * statistics.median(decode[way]):.2f}", f"{ratio:.3f}", " ".join(f"{p:.2f}" for p in pairs), f"{1e3 * statistics.median(prefill[way]):.0f}", f"{before:.3f}")
        console.print(table)
        print(json.dumps({"batch": size, "decode": decode, "prefill": prefill}))


if __name__ == "__main__":
    main()
