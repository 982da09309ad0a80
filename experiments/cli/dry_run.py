"""What a model and a stack would need, known without a weight: `python run.py dry_run=true`, and the table of
`docs/models.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from decoders import Stack, hf
from decoders.validation import Layers, layers

from .. import models

PICTURE = (640, 480)


@dataclass
class Sheet:
    """Figures of one model.

    Attributes:
        model: on the meta device.
        kinds: which layers decoders may read and prune, or why none.
        visual: visual tokens of the picture; prompt: all tokens of the prompt.
        weights: bytes; token: bytes of keys and values that one token takes in all layers.
    """

    model: torch.nn.Module
    kinds: Layers | str
    visual: int
    prompt: int
    weights: int
    token: int

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def cache(self, rows: int, new: int) -> int:
        """Bytes of keys and values of so many rows at the end of an answer of `new` tokens, with nothing pruned."""
        return rows * (self.prompt + new) * self.token

    def describe_layers(self) -> str:
        if isinstance(self.kinds, str):
            return self.kinds
        parts = [
            (self.kinds.whole, "whole sequence"),
            (self.kinds.windowed, "window"),
            (self.kinds.recurrent, "running state"),
        ]
        return ", ".join(f"{len(found)} {name}" for found, name in parts if found)


def sheet(config, picture: Image.Image, new: int) -> Sheet:
    """The figures of a `conf/model` entry for one picture with its prompt, and an answer of at most `new` tokens.

    Raises:
        InputError: if the architecture cannot be known (no figures, and the configuration cannot be reached).
    """
    model, processor = models.skeleton(config)
    inputs = models.encode(
        processor, [picture], config.prompt, "cpu", models.template(config, figures=config.random is not None)
    )
    ids = inputs["input_ids"]
    marks = list(hf.placeholder_ids(model.config).values())
    inner = hf.inner_language_model(model)
    cache = hf.empty_cache(inner)
    kinds = layers(cache, inner, ids.shape[1] + new)
    text = hf.text_config(inner)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    holding = hf.num_layers(inner) if isinstance(kinds, str) else len(kinds.whole) + len(kinds.windowed)
    share = {"8bit": 1, "4bit": 0.5}.get(
        config.quantization
    )  # bytes of a weight of a linear layer, but the head's; scales not counted
    linear = {
        id(module.weight)
        for module in model.modules()
        if share and isinstance(module, torch.nn.Linear) and module is not hf.output_embeddings(model)
    }
    weights = int(sum(p.numel() * (share if id(p) in linear else p.element_size()) for p in model.parameters()))
    bytes_each = next(model.parameters()).element_size()
    return Sheet(
        model,
        kinds,
        int(torch.isin(ids, torch.tensor(marks)).sum()),
        ids.shape[1],
        weights,
        2 * heads * width * holding * bytes_each,
    )


def show(console: Console, config, stacks: dict[str, Stack], picture: Image.Image, options: dict, batch: int) -> None:
    """Print what the run would need, and which decoders of its stacks can act on the model.

    Args:
        options: of `generate`; beams and answers multiply rows.
    """
    new = options["max_new_tokens"]
    found = sheet(config, picture, new)
    rows = batch * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    console.print(
        Text(f"{config.path or type(found.model).__name__}, {config.dtype}: nothing was loaded or run", style="bold")
    )
    table = Table(show_header=False)
    table.add_row("architecture", type(found.model).__name__)
    table.add_row("parameters", count(found.parameters))
    table.add_row("weights", size(found.weights))
    table.add_row("visual tokens", f"{found.visual} of a picture of {picture.width} x {picture.height}")
    table.add_row("prompt", f"{found.prompt} tokens")
    table.add_row("layers", found.describe_layers())
    table.add_row("keys and values", f"{size(found.token)} a token")
    console.print(table)
    needs = Table(
        "stack",
        "rows",
        "cache at the end",
        "with the weights",
        caption=Text(f"batch_size={batch}, {new} new tokens, nothing pruned; activations come on top", style="dim"),
    )
    verdicts: list[tuple[str, str | None]] = []
    for label, stack in stacks.items():
        refusals = stack.refusals(found.model, found.prompt + new)
        reads = [
            decoder.requirements(hf.inner_language_model(found.model))
            for decoder, why in zip(stack.decoders, refusals.values(), strict=False)
            if why is None
        ]
        asked = label[1:-1].split(",")  # by the name of the yaml, of which several may be one decoder
        verdicts += zip(asked if len(asked) == len(refusals) else refusals, refusals.values(), strict=False)
        mine = rows * (1 + sum(r.branch is not None for r in reads))
        cache = found.cache(mine, new + max((r.lookahead for r in reads), default=0))
        needs.add_row(Text(label), str(mine), size(cache), size(found.weights + cache))
    console.print(needs)
    if verdicts:
        acts = Table("decoder", "acts on this model")
        for name, why in verdicts:
            acts.add_row(name, Text("yes" if why is None else f"no: {why}", style="green" if why is None else "red"))
        console.print(acts)


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"


def size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    power = min(3, max(0, int(math.log(max(count, 1), 1024))))
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"
