"""Writes `docs/models.md`: `python tests/models_table.py`. What is known of every model of `conf/model`, and what was
tested of it, and how.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "decoders")]

import pytest
import test_families
import transformers
from PIL import Image
from tiny import families

from baselines import OPERA, VCD, DeCo, DoLa
from decoders import Stack
from experiments import models
from experiments.cli import dry_run
from experiments.findings.page import wrapped
from experiments.inputs import conf_files
from prunehal import PruneHal

NEW = 512
RUN = (
    "aya_vision_8b",
    "gemma3_4b",
    "glm41v_9b",
    "instructblip_7b",
    "internvl35_8b",
    "llava15_7b",
    "llava_next_mistral_7b",
    "llava_onevision_qwen2_7b",
    "qwen25vl_3b",
    "qwen25vl_7b",
    "qwen2vl_7b",
    "qwen3vl_4b",
    "smolvlm2_2b",
)  # by hand, on 2026-11-23
REAL = ("scenes", "scenes_smol")
STACK = Stack([PruneHal(), OPERA(), VCD(), DoLa(), DeCo()])
HEAD = f"""# Models

Written by `python tests/models_table.py` with transformers {transformers.__version__}; a test holds it up to date.

`model=` takes a name of the table below; `scenes`, the embedded model, is the default. `model=auto
model.path=FOLDER_OR_HUB_ID` takes any other model that `AutoModelForImageTextToText` loads; what cannot be decoded is
refused with the reason.

- `model.weights=random` builds the full-size architecture with random weights from figures in the yaml and needs no
  download: for speed and memory, what it says means nothing.
- `dry_run=true` prints visual tokens, layers, bytes of keys and values, memory, and which decoders of the stack can act
  and why not; it loads and allocates no weights.
- `model.dtype`, `model.attn_implementation` (`sdpa`, `eager`, `flash_attention_2`), `model.device`,
  `model.device_map=auto`, `model.quantization=4bit` or `8bit`, `model.adapter=FOLDER` (PEFT),
  `model.template='"USER: {{images:<image>}}{{prompt}} ASSISTANT:"'` for processors without a chat template.
- A model may set decoders' options: PruneHal's `r` and `t` are the paper's for LLaVA-1.5 and InstructBLIP; what you
  type goes before.
- **Windows (Gemma 3, Aya Vision)**: decoders read and prune the layers that attend to the whole sequence; the others
  keep all their slots, and their window is made by position.
- **Linear attention and convolutions (Qwen3.5, LFM2-VL)**: likewise; OPERA is refused, because a running state can
  neither try candidates side by side nor take words back.
- Videos need torchvision (`pip install torchvision`); several images a prompt, tiles and prompts of unequal length need
  nothing.

## What was tested

Nothing was run with real weights of full size, and nothing on a GPU: **no published number was reproduced.**

- **tiny**: every family's real class with tiny random weights, on inputs of its real processor class, through the
  checks of the second table (`tests/decoders/test_families.py`).
- **figures**: the full-size architecture was built without memory from the figures in `conf/model` (that is what
  `model.weights=random` and `dry_run=true` use). Its number of parameters is within 0.25 % of the published one, and
  the processor gives the known number of visual tokens (`tests/experiments/test_models.py`). Rotary settings, token ids
  and prompt formats of the figures are not checked by that; with weights from a hub or a folder, all of these come from
  there.
- **run**: built at full size with random bfloat16 weights (SmolVLM2: float32) and run on a CPU, by hand, for a few
  tokens, which shows that figures, processor and loop fit together, and nothing else: `python run.py model=NAME
  model.weights=random model.device=cpu model.dtype=bfloat16 task.count=1 max_new_tokens=4 'decoder=[prunehal]'`.
- **real weights**: `scenes`, which this repository trains itself, and `scenes_smol`, SmolLM2-135M-Instruct with what it
  trains for it (an optional install).

## Figures

One picture of {" x ".join(map(str, dry_run.PICTURE))} with the model's prompt. Layers: those that attend to the whole
sequence, which decoders read and prune; those that attend within a window keep all their slots.

| `model=` | weights | family | parameters | visual tokens | prompt | layers | keys and values a token | decoders that \
cannot act | tested |
|---|---|---|---|---|---|---|---|---|---|
"""
CHECKS = """
## Checks, by family

| check | what it says |
|---|---|
| [] = generate | the empty stack says what transformers' own `generate` says: greedy, sampling at one seed, three \
beams; one prompt and three |
| pruned = masked | PruneHal's votes, kept sets and logits are those of an independent run in which the same slots are \
masked |
| vcd | neutral settings change nothing; at alpha 1 the scores are the contrast of two of transformers' runs |
| dola | the scores are those of the hidden states that transformers collects |
| opera neutral, opera | without penalty nothing changes; with it, candidates score as when each is run alone |
| opera+prunehal | under three beams, going back and pruning; a batch equals one by one |
| batch = one by one | prompts of unequal length |
| two pictures, one and two pictures, video | in a prompt; in a batch, also under beams |

"""


def figures() -> str:
    """A line a model."""
    lines = []
    for name in conf_files.files("model"):
        if name == "auto":
            continue
        entry = models.entry(name)
        if entry.unsupported:
            lines.append(f"| `{name}` | {_link(entry.path)} | - | - | - | - | - | - | all: {entry.unsupported} | - |")
            continue
        sheet = dry_run.sheet(entry, Image.new("RGB", dry_run.PICTURE), NEW)
        kind = sheet.model.config.model_type
        cannot = [
            f"{decoder}: {why}" for decoder, why in STACK.refusals(sheet.model, sheet.prompt + NEW).items() if why
        ]
        tested = (
            ["tiny"] * (kind in {families.kind(family) for family in families.NAMES})
            + ["figures"] * bool(entry.random)
            + ["real weights"] * (name in REAL)
            + ["run"] * (name in RUN)
        )
        cells = [
            f"`{name}`",
            _link(entry.path or entry.build.rpartition(".")[0].rpartition(".")[0].replace(".", "/")),
            kind,
            dry_run.count(sheet.parameters),
            sheet.visual,
            sheet.prompt,
            sheet.describe_layers(),
            dry_run.size(sheet.token),
            "; ".join(cannot) or "none",
            ", ".join(tested),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _link(path: str) -> str:
    return f"`{path}`" if (ROOT / path).exists() else f"[{path}](https://huggingface.co/{path})"


def checks() -> str:
    """The table that the tests of all families print."""
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        code = pytest.main(
            [
                str(ROOT / "tests/decoders/test_families.py"),
                "--figures",
                "-q",
                "-p",
                "no:cacheprovider",
                f"--rootdir={ROOT}",
            ]
        )
        said = sys.stdout.getvalue()
    finally:
        sys.stdout = out
    if code:
        raise SystemExit(f"the tests of the families fail; mend them first\n{said[-3000:]}")
    rows = [
        re.split(r"  +", line.rstrip())
        for line in said.splitlines()
        if re.match(r"\s+\[\] = generate  |\w+ +(pass|-|refused|n/a|FAIL)  ", line)
    ]
    head, *body = rows
    lines = [head, ["---"] * len(head), *([f"`{row[0]}`", *row[1:]] for row in body)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    why: dict[str, list[str]] = {}
    for (family, check), reason in test_families.NOT_APPLICABLE.items():
        why.setdefault(f"n/a: {reason}", []).append(f"{family} ({check})")
    for family in dict.fromkeys(family for family, _ in test_families.REFUSED):
        why.setdefault(
            "refused: OPERA runs candidates side by side and goes back, which layers that keep a running state cannot",
            [],
        ).append(family)
    why["refused: no stack decodes encoder-decoder models, nor those that see pictures by cross-attention"] = list(
        families.REFUSED
    )
    notes = [wrapped(f"- {reason}: {', '.join(names)}", "  ") for reason, names in why.items()]
    return table + "\n\n" + "".join(f"{note}\n" for note in notes)


if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(HEAD + figures() + CHECKS + checks())
