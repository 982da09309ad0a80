"""The tables of docs/speed.md are those that the command makes of what was measured."""

import json

from experiments.bench import tables

FACTS = dict(model="tiny", dtype="float32", device="cpu", search="greedy", beams=5, batch=2, tokens=8)
TIMES = {
    **FACTS,
    "bandwidth": 1e9,
    "read": {"transformers": 5e6, "[]": 2e6},
    "floor": 0.004,
    "decode": {"transformers": [0.01, 0.02, 0.04], "[]": [0.02, 0.02, 0.02]},
    "prefill": {"transformers": [0.1, 0.1, 0.1], "[]": [0.2, 0.2, 0.2]},
    "compile": {"transformers": [], "[]": []},
}
MEMORY = {**FACTS, "memory": {"transformers": {"before": 2**20, "peak": 3 * 2**20}, "[]": {"before": 0, "peak": 2**20}}}
COMPILING = {**FACTS, "compiling": {"[] compiled": {"cold": 20.5, "warm": 3.25, "graphs": 2}}}


def test_the_page_is_what_the_command_makes():
    page = tables.PAGE.read_text()
    assert page.count("<!-- tables of ") == len(list(tables.PAGE.with_suffix("").glob("*.json")))
    assert tables.filled(page, tables.PAGE.with_suffix("")) == page and tables.main(["--check"]) == 0
    assert "An earlier version of the loop" in " ".join(page.partition("<!-- tables of h100 -->")[2].split())


def test_ratios_are_taken_within_a_repeat_and_the_floor_is_what_a_row_reads():
    text = tables.markdown(TIMES)
    assert "| `transformers` | 20.0 | 1.00 | 1.00-1.00 | 100 | 25% | 100 | 1.00 |" in text
    assert "| `[]` | 20.0 | 1.00 | 0.50-2.00 | 100 | 10% | 200 | 2.00 |" in text
    assert "compiled" not in text and "rollbacks" not in text and "MiB" not in text


def test_figures_of_other_kinds_join_those_of_the_same_search(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "page"
    folder.mkdir()
    page.write_text("before\n<!-- tables of a -->\nstale\n<!-- end -->\nafter\n")
    beam = {**TIMES, "search": "beam"}
    (folder / "a.json").write_text("\n".join(["said", *map(json.dumps, (TIMES, beam, MEMORY, COMPILING))]))
    assert tables.main(["--page", str(page), "--check"]) == 1 and "stale" in page.read_text()
    assert tables.main(["--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    greedy, beams = text.split("tiny, float32, ")[1:]
    assert "| `transformers` | 20.0 | 1.00 | 1.00-1.00 | 100 | 25% | 100 | 1.00 | 3 | 2.00 | 1.00 |  |  |" in greedy
    assert "| `[]` | 20.0 | 1.00 | 0.50-2.00 | 100 | 10% | 200 | 2.00 | 1 | 1.00 | 0.50 |  |  |" in greedy
    assert "| `[] compiled` |  |  |  |  |  |  |  |  |  |  | 20.5 | 3.25 |" in greedy
    assert beams.startswith("beam, 5 beams") and "MiB" not in beams
