"""Write the tables of `docs/speed.md` from what the benchmark measured: `python -m experiments.bench.tables`.

Between `<!-- tables of NAME -->` and `<!-- end -->` in a page stands what the command makes of `NAME.json`, in the
folder that is called as the page; all other text is left as it is. Such a file holds what `experiments.bench.decode`
printed, a JSON object a line (an object about memory or compiling joins the one about time of the same search and
batch), or is the gpu.json of `experiments.bench.gpu`. Only columns for which something was measured are shown.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
MiB = 2**20
# what two measurements must have in common to be shown in one table
SAME = ("model", "dtype", "device", "search", "beams", "batch")


def figures(x: float) -> str:
    """A number in three figures."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def cells(facts: dict) -> dict[str, dict[str, str]]:
    """{column: {row: cell}} of what `experiments.bench.decode` measured; ratios are to the first row, those of times
    taken within a repeat.
    """
    every = {**_times(facts), **_memory(facts), **_compiling(facts)}
    return {column: known for column, known in every.items() if any(known.values())}


def rows(facts: dict) -> list[str]:
    """Names of all that was measured, in the order in which it was."""
    return list(dict.fromkeys(n for key in ("decode", "memory", "compiling") for n in facts.get(key, {})))


def _times(facts: dict) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {}
    decode, prefill = facts.get("decode", {}), facts.get("prefill", {})
    base = next(iter(decode), "")
    for name, seconds in decode.items():
        middle = statistics.median(seconds)
        ratios = [a / b for a, b in zip(seconds, decode[base], strict=True)]
        before = [a / b for a, b in zip(prefill[name], prefill[base], strict=True)]
        floor = facts["read"][name] / facts["bandwidth"] if "read" in facts else facts["floor"]
        row = {
            "ms a token": figures(1e3 * middle),
            "ratio": f"{statistics.median(ratios):.2f}",
            "lowest-highest": f"{min(ratios):.2f}-{max(ratios):.2f}",
            "tokens a second": figures(facts["batch"] / middle),
            "floor's share": f"{floor / middle:.0%}",
            "prefill ms": f"{1e3 * statistics.median(prefill[name]):.0f}",
            "its ratio": f"{statistics.median(before):.2f}",
            "rollbacks": " ".join(str(n) for n in sorted(set(facts.get("rollbacks", {}).get(name, [])))),
        }
        for column, cell in row.items():
            out.setdefault(column, {})[name] = cell
    return out


def _memory(facts: dict) -> dict[str, dict[str, str]]:
    found = facts.get("memory", {})
    out: dict[str, dict[str, str]] = {"peak MiB": {}, "generation's own MiB": {}, "ratio of it": {}}
    base = next(iter(found.values()), {})
    for name, each in found.items():
        own, of = each["peak"] - each["before"], base["peak"] - base["before"]
        out["peak MiB"][name] = f"{each['peak'] / MiB:.0f}"
        out["generation's own MiB"][name] = figures(own / MiB)
        out["ratio of it"][name] = f"{own / of:.2f}" if of else ""
    return out


def _compiling(facts: dict) -> dict[str, dict[str, str]]:
    """Seconds on a machine that never compiled the step, and with what that left on disk; where they were not measured
    apart, those of a process that found what it found.
    """
    apart = facts.get("compiling", {})
    spent = {} if apart else facts.get("compile", {})
    return {
        "compiled in s": {name: f"{sum(each):.0f}" for name, each in spent.items() if each},
        "compiled cold in s": {name: figures(each["cold"]) for name, each in apart.items()},
        "warm in s": {name: figures(each["warm"]) for name, each in apart.items()},
    }


def about(facts: dict) -> str:
    """What was measured, in a sentence, and what the floor is."""
    beams = f", {facts['beams']} beams" if facts["search"] == "beam" else ""
    title = f"{facts['model']}, {facts['dtype']}, {facts['search']}{beams}, batch {facts['batch']}; {facts['tokens']}"
    if "decode" not in facts:
        return f"{title} tokens."
    title += f" tokens, {len(next(iter(facts['decode'].values())))} repeats."
    if "read" in facts:
        return (
            f"{title} The floor is the time in which the weights and the cache of a step are read at"
            f" {facts['bandwidth'] / 1e9:.0f} GB/s, the bandwidth of a copy."
        )
    return f"{title} The floor, reading every weight once, is {1e3 * facts['floor']:.2f} ms."


def markdown(facts: dict) -> str:
    """A sentence and a table."""
    columns, names = cells(facts), rows(facts)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        lines.append(f"| `{name}` | {' | '.join(known.get(name, '') for known in columns.values())} |")
    return "\n".join([textwrap.fill(about(facts), 120), "", *lines])


def console(title: str, facts: dict) -> Table:
    """The same for a terminal."""
    columns = cells(facts)
    lines = [[name, *(known.get(name, "") for known in columns.values())] for name in rows(facts)]
    return listing(title, ["", *columns], lines)


def listing(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal, the first column to the left."""
    out = Table(
        title=escape(title), box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left"
    )
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    for line in lines:
        out.add_row(*map(escape, line))
    return out


def load(text: str) -> tuple[str, list[dict]]:
    """What is said of all, and what was measured: of a gpu.json, or of lines of `experiments.bench.decode`.

    Facts about the same search and batch are joined.
    """
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = {}
    if "parts" in whole:
        machine = whole["machine"]
        words = (
            f"{machine['device']}, {machine['cores']} CPU cores, Python {machine['python']}, torch {machine['torch']}"
            f" (CUDA {machine['cuda']}), transformers {machine['transformers']}."
        )
        words = f"{words} {whole['note']}" if "note" in whole else words
        found = [facts for part in whole["parts"] for facts in part["results"]]
    else:
        words, found = "", [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    joined: list[dict] = []
    for facts in found:
        fitting = [one for one in joined if all(one[key] == facts[key] for key in SAME) and _apart(one, facts)]
        if fitting:
            fitting[0].update({key: value for key, value in facts.items() if key not in fitting[0]})
        else:
            joined.append(dict(facts))
    return words, joined


def _apart(one: dict, other: dict) -> bool:
    """Whether they hold figures of different kinds."""
    return not any(key in one and key in other for key in ("decode", "memory", "compiling"))


def filled(page: str, folder: Path) -> str:
    """The page with its tables made anew of the files in `folder`.

    Raises:
        OSError: for a file that is not there.
    """

    def fill(match: re.Match) -> str:
        words, found = load((folder / f"{match[2]}.json").read_text())
        return "\n\n".join([match[1], *filter(None, [textwrap.fill(words, 120)]), *map(markdown, found), match[3]])

    return re.sub(r"(<!-- tables of ([\w-]+) -->).*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.tables", description=__doc__.split("\n\n")[1])
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/speed.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page would change")
    args = parser.parse_args(argv)
    old = args.page.read_text()
    new = filled(old, args.page.with_suffix(""))
    if args.check:
        return int(new != old)
    args.page.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
