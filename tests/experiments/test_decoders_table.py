"""The table of decoders."""

from pathlib import Path

import pytest

from experiments.tools import decoders_table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_table_of_the_readme_is_what_the_command_writes():
    assert decoders_table.with_table(README) == README.read_text(), (
        "run python -m experiments.tools.decoders_table README.md"
    )


def test_a_row_for_each_decoder_of_a_paper_says_what_it_reads_and_takes():
    rows = [line for line in decoders_table.with_table(README).splitlines() if line.startswith("| `")]
    names = [line.split("`")[1] for line in rows]
    assert names[0] == "prunehal" and set(names) == set(decoders_table.methods())
    opera, vcd = (next(line for line in rows if line.startswith(f"| `{name}`")) for name in ("opera", "vcd"))
    assert "attention, candidates" in opera and "| 5 |" in opera
    assert "a branch" in vcd and "| 2 |" in vcd


def test_a_page_without_marks_is_refused(tmp_path, capsys):
    (tmp_path / "page.md").write_text("# A page\n")
    with pytest.raises(SystemExit):
        decoders_table.main([str(tmp_path / "page.md")])
    assert "has no lines '<!-- decoders -->'" in capsys.readouterr().err
