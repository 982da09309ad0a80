"""Write the table of decoders of a page: `python -m experiments.tools.decoders_table README.md`.

Between `<!-- decoders -->` and `<!-- /decoders -->` stands what the command makes of the decoders' docstrings, of what
they require of a model, of the models of `conf/model` that they refuse, and of `docs/speed/cpu-greedy.json`, which
`experiments.bench.decode` measured. All other text is left as it is.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from hydra.utils import get_class

from decoders import Decoder, Requirements, Stack
from experiments import models
from experiments.inputs import conf_files

ROOT = Path(__file__).resolve().parents[2]
SPEED = ROOT / "docs" / "speed" / "cpu-greedy.json"
MARKS = re.compile(r"(<!-- decoders -->\n).*?(<!-- /decoders -->)", re.S)
READS = {
    "attention": "attention",
    "hidden": "hidden states",
    "early_logits": "early logits",
    "branch": "a branch",
    "lookahead": "candidates",
    "visual": "visual tokens",
}
HOOKS = {
    "process_logits": "scores",
    "rescore_candidates": "candidates, going back",
    "select_slots": "cache",
    "edit_attention": "attention",
    "edit_mlp": "MLPs",
    "edit_hidden_states": "hidden states",
    "encoding_context": "vision tower",
}


def methods() -> dict[str, type[Decoder]]:
    """{name: class} of the decoders of `conf/decoder` that are of a paper; controls and probes have none."""
    found = {}
    for name in conf_files.files("decoder"):
        target = get_class(conf_files.read("decoder", name)[name]["_target_"])
        if name == target.__name__.lower() and _paper(target):
            found[name] = target
    return dict(sorted(found.items(), key=lambda item: (item[0] != "prunehal", item[0])))


def _paper(decoder: type[Decoder]) -> str | None:
    found = re.search(r"arxiv\.org/abs/(\d+\.\d+)", inspect.getdoc(decoder) or "")
    return found[1] if found else None


def acts_on(decoder: type[Decoder]) -> str:
    """What its hooks change or see, in words."""
    return ", ".join(words for hook, words in HOOKS.items() if getattr(decoder, hook) is not getattr(Decoder, hook))


def reads(needs: Requirements) -> str:
    """What it asks the loop for, in words."""
    asked = {field: getattr(needs, field) for field in READS}
    return ", ".join(
        READS[field] for field, value in asked.items() if value or (field == "attention" and value is None)
    )


def ratios(name: str, facts: dict) -> list[str]:
    """Time a token relative to transformers' own greedy decoding, as it is and compiled; - where none was measured."""
    times = facts.get("decode", {})
    base = next(iter(times.values()), [])
    out = []
    for row in (f"[{name}]", f"[{name}] compiled"):
        pairs = zip(times.get(row, []), base, strict=False)
        values = [ours / theirs for ours, theirs in pairs]
        out.append(f"{statistics.median(values):.2f}" if values else "-")
    return out


def table(page: Path) -> str:
    """The table in markdown, with links from a page."""
    facts = json.loads(SPEED.read_text()) if SPEED.exists() else {}
    known = {name: models.entry(name) for name in conf_files.files("model")}
    built = {name: models.skeleton(entry)[0] for name, entry in known.items() if entry.random and not entry.unsupported}
    head = ["decoder", "what it does", "paper", "file, lines", "acts on", "reads", "rows", "models", "time", "compiled"]
    lines = [head, ["---"] * len(head)]
    for name, kind in methods().items():
        file, decoder = Path(inspect.getfile(kind)), kind()
        link = Path(os.path.relpath(file, page.resolve().parent)).as_posix()
        refused = [Stack([decoder]).refusals(model)[name] for model in built.values()]
        acting = [model for model, why in zip(built.values(), refused, strict=True) if why is None]
        needs = decoder.requirements(acting[0]) if acting else Requirements()
        does = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
        cells = [
            f"`{name}`",
            does,
            f"[{_paper(kind)}](https://arxiv.org/abs/{_paper(kind)})",
            f"[{file.name}]({link}), {len(file.read_text().splitlines())}",
            acts_on(kind),
            reads(needs),
            str((1 + (needs.branch is not None)) * max(1, needs.lookahead)),
            f"{len(acting)} of {len(built)}" if acting else "with a file of the model's own",
            *ratios(name, facts),
        ]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(page: Path) -> str:
    """The text of a page with the table as it is now.

    Raises:
        ValueError: for a page without the two marks.
    """
    text = page.read_text()
    if not MARKS.search(text):
        raise ValueError(f"{page} has no lines '<!-- decoders -->' and '<!-- /decoders -->'")
    return MARKS.sub(lambda found: f"{found[1]}\n{table(page)}\n{found[2]}", text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.decoders_table", description="Write the table of decoders of a page."
    )
    parser.add_argument("page", type=Path, help="a markdown file with the two marks")
    page = parser.parse_args(argv).page
    try:
        page.write_text(with_table(page))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
