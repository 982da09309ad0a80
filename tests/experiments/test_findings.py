"""The page of findings: made of the store alone, and refused where the store lacks answers."""

from functools import partial

import pytest
from rich.console import Console

from experiments import findings, jobs, overrides
from experiments.errors import InputError
from experiments.results import Results
from experiments.studies import Sheet
from experiments.studies.base import Estimate


def test_a_table_in_markdown():
    sheet = Sheet("Title", [{"cell": "a|b", "n": 3, "x": Estimate(1.26, -0.5, 2, 1, "+")}, {"cell": "<b>c</b> *[d](e)", "p": 0.012345}])
    assert findings.markdown(sheet).splitlines() == ["**Title**", "", "| cell | n | x | p |", "|---|---|---|---|", "| a\\|b | 3 | +1.3 [-0.5, +2.0] |  |", r"| \<b\>c\</b\> \*\[d\](e) |  |  | 0.0123 |"]


def test_written_from_the_store_alone(tmp_path, monkeypatch):
    real, console, store = jobs.study_cells, Console(quiet=True), Results(tmp_path / "results.sqlite")
    opened = []

    def few(study, typed, *rest):
        opened.append(cells := real(study, ["task.count=30"], *rest))
        return cells

    monkeypatch.setattr(jobs, "study_cells", few)
    (template := tmp_path / "in.md").write_text("# Here\n\n{{ ranking }}\n\nafter\n")
    write = partial(findings.write, store, console, template, tmp_path / "findings.md")
    with pytest.raises(InputError, match=r"python run.py experiment=ranking  # 390 answers"):
        write()
    assert not (tmp_path / "findings.md").exists()
    for cell in opened[0].values():
        said = "A dog." if "keep" in cell.line else "A dog and a cat."
        store.add(cell.run, [{"image": i.id, "picture": i.id, "caption": said, "objects": i.objects, "prunes": [], "tokens": 4} for i in cell.items])
    write()
    text = (tmp_path / "findings.md").read_text()
    assert "{{" not in text and "# Here" in text and "\nafter\n" in text and "390 answers in 13 runs" in text
    assert "`python run.py experiment=ranking`" in text and r"30" in text and "+1.0 [+1.0, +1.0]" in text
    assert (tmp_path / "findings" / "ranking.png").stat().st_size > 5000 and (tmp_path / "findings" / "ranking-1.csv").exists()


def test_every_study_has_its_place():
    text = (findings.DOCS / "findings.in.md").read_text()
    assert [name for name in overrides.files("experiment") if f"{{{{ {name} }}}}" not in text] == []
