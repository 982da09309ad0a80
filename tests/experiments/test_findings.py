"""The page of findings: made of the store alone, and refused where the store lacks answers."""

import json
import re
import shlex
from functools import partial

import hydra
import pytest
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console

from experiments import findings
from experiments.cli import arguments
from experiments.inputs import conf_files
from experiments.inputs.errors import InputError
from experiments.results import Estimate, Results, Sheet
from experiments.studies.cells import study_cells


def test_a_table_in_markdown():
    sheet = Sheet(
        "Title",
        [{"cell": "a|b", "n": 3, "x": Estimate(1.26, -0.5, 2, 1, "+")}, {"cell": "<b>c</b> *[d](e)", "p": 0.012345}],
    )
    assert findings.markdown(sheet).splitlines() == [
        "**Title**",
        "",
        "| cell | n | x | p |",
        "|---|---|---|---|",
        "| a\\|b | 3 | +1.3 [-0.5, +2.0] |  |",
        r"| \<b\>c\</b\> \*\[d\](e) |  |  | 0.0123 |",
    ]


def test_written_from_the_store_alone(tmp_path, monkeypatch):
    real, console, store = study_cells, Console(quiet=True), Results(tmp_path / "results.sqlite")
    opened = []

    def few(study, typed, *rest):
        opened.append(cells := real(study, ["task.count=30"], *rest))
        return cells

    monkeypatch.setattr(findings, "study_cells", few)
    (template := tmp_path / "in.md").write_text("# Here\n\n{{ ranking }}\n\nafter\n")
    write = partial(findings.write, store, console, template, tmp_path / "findings.md")
    with pytest.raises(InputError, match=r"python run.py experiment=ranking  # 390 answers"):
        write()
    assert not (tmp_path / "findings.md").exists()
    for cell in opened[0].values():
        said = "A dog." if "keep" in cell.line else "A dog and a cat."
        store.add(
            cell.run,
            [
                {"image": i.id, "picture": i.id, "caption": said, "objects": i.objects, "prunes": [], "tokens": 4}
                for i in cell.items
            ],
        )
    write()
    text = (tmp_path / "findings.md").read_text()
    assert "{{" not in text and "# Here" in text and "\nafter\n" in text and "390 answers in 13 runs" in text
    assert "`python run.py experiment=ranking`" in text and "| 30 |" in text and "+1.0 [+1.0, +1.0]" in text
    assert (tmp_path / "findings" / "ranking.png").stat().st_size > 5000 and (
        tmp_path / "findings" / "ranking-1.csv"
    ).exists()


def test_every_study_has_its_place():
    text = (findings.DOCS / "findings.in.md").read_text()
    assert [name for name in conf_files.files("experiment") if f"{{{{ {name} }}}}" not in text] == []


@pytest.mark.slow
def test_the_commands_for_llava_and_coco_make_their_cells(tmp_path):
    """On files in COCO's format; nothing is generated."""
    (tmp_path / "val2014").mkdir()
    rows = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    for row in rows:
        Image.new("RGB", (4, 3)).save(tmp_path / "val2014" / row["file_name"])
    names = {1: "person", 18: "dog", 34: "frisbee", 28: "umbrella", 44: "bottle", 62: "chair"}
    marks = [{"id": 10 * i + c, "image_id": i, "category_id": c} for i in range(3) for c in list(names)[i : i + 4]]
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {"images": rows, "annotations": marks, "categories": [{"id": i, "name": n} for i, n in names.items()]}
        )
    )
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": []}))
    lines = re.findall(
        r"^python run.py (experiment=.*model=llava15_7b[^#\n]*)", (findings.DOCS / "findings.in.md").read_text(), re.M
    )
    assert len(lines) >= 7
    for line in lines:
        typed = [*shlex.split(line), f"task.instances={tmp_path}/instances.json", f"task.images={tmp_path}/val2014"]
        typed += [] if "coco_pope" in line else [f"task.captions={tmp_path}/captions.json"]
        arguments.check(typed)
        with hydra.initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
            study = instantiate(hydra.compose("run", typed).experiment)
            cells = study_cells(study, typed, Results(tmp_path / "results.sqlite"), Console(quiet=True))
        assert len(cells) == len(study.lines()) > 1 and all(
            len(cell.items) >= 3 and cell.config.model.path == "llava-hf/llava-1.5-7b-hf" for cell in cells.values()
        ), line
