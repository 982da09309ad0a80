"""What the studies show: tables of a store, and a page of these tables alone."""

import csv
import json
import re
import shlex

import hydra
import pytest
import yaml
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console

from experiments.cli import arguments
from experiments.findings import DOCS, RESULTS, tables
from experiments.findings import page as page_module
from experiments.findings.__main__ import main, parser
from experiments.findings.page import Files, index, page
from experiments.inputs import conf_files
from experiments.inputs.errors import InputError
from experiments.results import Results
from experiments.studies.cells import study_cells

TEMPLATE = DOCS / "results.in.md"
FILES = Files(RESULTS)
SPECS = yaml.safe_load(TEMPLATE.with_suffix(".yaml").read_text())


# the pages of this repository


@pytest.mark.parametrize(
    "file, text", [("results.md", lambda: page(TEMPLATE, RESULTS)), ("results/README.md", lambda: index(RESULTS))]
)
def test_a_page_is_what_its_template_and_the_csv_files_make(file, text):
    """If not: python -m experiments.findings page."""
    assert (DOCS / file).read_text() == text()


def test_every_study_has_its_place():
    marks = re.findall(r"^\{\{ (\w+) \}\}$", TEMPLATE.read_text(), re.M)
    assert sorted(marks) == sorted(SPECS)
    placed = [study for name in marks for study in SPECS[name]["studies"]]
    assert sorted(placed) == sorted(conf_files.files("experiment")) == sorted(f.stem for f in RESULTS.glob("*.json"))


def test_the_page_is_short_and_its_links_lead_somewhere():
    text = (DOCS / "results.md").read_text()
    assert len(text.splitlines()) < 200
    for file in (DOCS / "results.md", RESULTS / "README.md"):
        links = re.findall(r"\]\(([^)#]+)", file.read_text())
        assert len(links) > 20 and [link for link in links if not (file.parent / link).exists()] == []


def _figures(studies: list[str]) -> tuple[set[float], set[float]]:
    """All numbers of some studies' tables, and those of them that are differences with Holm's p below 0.05."""
    every, significant = set(), set()
    for study in studies:
        names = [f"{study}-{number}" for number in range(1, len(FILES.about(study)["tables"]) + 1)]
        known = [(name, row, column) for name in names for row in FILES.rows(name) for column in row]
        passed = {
            (row["from"], row["to"], row["metric"])
            for name, row, column in known
            if column == "p, Holm" and float(row[column]) < 0.05
        }
        for _, row, column in known:
            if re.fullmatch(r"-?\d+\.\d+", row[column]):
                every.add(abs(float(row[column])))
                if (row.get("from"), row.get("to"), column) in passed:
                    significant.add(abs(float(row[column])))
    return every, significant


@pytest.mark.parametrize("name", SPECS)
def test_figures_in_the_text_are_those_of_the_tables(name):
    section = next(part for part in TEMPLATE.read_text().split("\n## ") if f"{{{{ {name} }}}}" in part)
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", section)
    found = re.findall(r"(?<![\w=.-])[-+]?(\d+\.(\d+))(\\\*)?", prose)
    every, significant = _figures(SPECS[name]["studies"])
    assert found or name == "frontier"
    for text, digits, star in found:
        known = significant if star else every
        assert text in {f"{value:.{len(digits)}f}" for value in known}, f"{text}{star}"


def test_the_commands_of_the_docs_are_understood():
    lines = re.findall(r"^python -m experiments.findings ([^#\n]*)", (DOCS / "experiments.md").read_text(), re.M)
    steps = [parser().parse_args(shlex.split(line)) for line in lines]
    assert {one.step for one in steps} == {"tables", "page"}
    assert all(name in conf_files.files("experiment") for one in steps for name in getattr(one, "studies", []))


# a page of other tables


@pytest.fixture
def made(tmp_path):
    """A template, its yaml and the files of two studies; writes them, some changed, and returns the page."""

    def write(**changed: str) -> str:
        about = {"title": "T", "command": "python run.py experiment=x", "pictures": [9], "tables": ["A; b", "Tests"]}
        about |= {"on": "scenes", "pages": [], "code": ["abc"], "versions": ["torch 1"]}
        files = {
            "in.md": "# Here\n\n{{ one }}\n\nafter\n",
            "in.yaml": "one: {studies: [x, y], rows: [x-1], columns: {'': to, n: n, a: a %, other: [y-1, b]}}",
            "x.json": json.dumps(about),
            "y.json": json.dumps(about | {"tables": ["Only"]}),
            "x-1.csv": 'from,to,n,a %,"a %, low","a %, high"\n[],[p],9,1.26,-0.5,2.0\n[],[q],9,-3.0,-4.0,-1.0\n',
            "x-2.csv": 'from,to,metric,p,"p, Holm"\n[],[p],a %,0.02,0.06\n[],[q],a %,0.02,0.04\n',
            "y-1.csv": "from,to,b\n[],[q],few\n[],[p],0.25\n",
        }
        for name, text in (files | changed).items():
            (tmp_path / name).write_text(text)
        return page(tmp_path / "in.md", tmp_path)

    return write


def test_a_mark_becomes_a_table_a_plot_and_commands(made, tmp_path):
    assert made().splitlines()[2:] == [
        "# Here",
        "",
        "|  | n | a | other |",
        "| --- | --- | --- | --- |",
        "| `[p]` | 9 | +1.3 [-0.5, +2.0] | +0.2 |",
        "| `[q]` | 9 | -3.0* [-4.0, -1.0] | few |",
        "",
        "![T](results/x.png)",
        "",
        "- `python run.py experiment=x`, 9 pictures: [all tables](results/README.md#x).",
        "- `python run.py experiment=x`, 9 pictures: [all tables](results/README.md#y).",
        "",
        "after",
    ]
    listed = index(tmp_path)
    assert "- [x-1.csv](x-1.csv): A; b\n- [x-2.csv](x-2.csv): Tests\n- [x.png](x.png): T\n" in listed
    assert "## y" in listed and "torch 1" in listed and "abc" in listed


def test_rows_can_be_chosen_and_a_table_left_out(made):
    text = made(**{"in.yaml": "one: {studies: [x], rows: [x-1], only: [{to: '[q]'}], columns: {a: a %}}"})
    assert "| -3.0* [-4.0, -1.0] |" in text and "+1.3" not in text
    assert "|" not in made(**{"in.yaml": "one: {studies: [x]}"})


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"in.md": "{{ on }}"}, "Unknown table 'on'. Did you mean 'one'"),
        ({"in.yaml": "one: {studies: [x], rows: [x-1], columns: {a: b %}}"}, "Unknown column of x-1.csv 'b %'"),
        ({"in.yaml": "one: {studies: [x], rows: [x-3], columns: {a: a %}}"}, "there is no '.*x-3.csv'"),
        ({"in.yaml": "one: {studies: [x], rows: [x-1], only: [{n: 8}], columns: {a: a %}}"}, "no row of x-1"),
        ({"y-1.csv": "from,to,b\n[],[q],0.5\n"}, "y-1.csv has 0 rows of"),
    ],
)
def test_what_is_named_and_not_there_is_said(made, changed, said):
    with pytest.raises(InputError, match=said):
        made(**changed)


def test_each_file_is_read_once(made, monkeypatch):
    read, real = [], page_module._text
    monkeypatch.setattr(page_module, "_text", lambda file: read.append(file.name) or real(file))
    assert made().count("*") == 1
    assert len(read) == len(set(read)) and {"x.json", "x-1.csv", "x-2.csv", "y-1.csv"} <= set(read)


# tables of a store


def test_tables_are_written_of_complete_studies_alone(tmp_path, monkeypatch):
    real, store = study_cells, Results(tmp_path / "results.sqlite")
    opened = {}

    def few(study, typed, *rest):
        study.pairs = study.pairs[:1] + study.pairs[3:4]  # to compose a cell takes time
        opened[study.name] = cells = real(study, ["task.count=30"], *rest)
        return cells

    monkeypatch.setattr(tables, "study_cells", few)
    folder, console = tmp_path / "out", Console(quiet=True)
    names = ["ranking", "first_token"]
    assert tables.write_tables(names, store, console, folder) == [] and not folder.exists()
    for cell in opened["ranking"].values():
        said = {"caption": "A dog." if "keep" in cell.line else "A dog and a cat.", "prunes": [], "tokens": 4}
        rows = [{"image": i.id, "picture": i.id, "objects": i.objects, "seconds": 0.02} | said for i in cell.items]
        store.add(cell.run, rows)
    folder.mkdir()
    for name in ("first_token-1.csv", "ranking-9.csv"):
        (folder / name).write_text("old")
    assert tables.write_tables(names, store, console, folder) == ["ranking"]
    written = {f"ranking-{number}.csv" for number in (1, 2, 3, 4)} | {"ranking.png", "ranking.json"}
    assert {file.name for file in folder.iterdir()} == written | {"first_token-1.csv"}
    about = json.loads((folder / "ranking.json").read_text())
    assert about["command"] == "python run.py experiment=ranking" and about["pictures"] == [30]
    assert about["tables"][1:] == ["Levels", "Tests", "CHAIR in context, not tested"] and any(
        v.startswith("torch ") for v in about["versions"]
    )
    with (folder / "ranking-1.csv").open(newline="") as file:
        assert [row["n"] for row in csv.DictReader(file)] == ["30"] * 4
    with (folder / "ranking-2.csv").open(newline="") as file:
        assert [row["ms a token"] for row in csv.DictReader(file)] == ["5.0"] * 7


def test_a_study_whose_model_is_not_there_is_passed_over(tmp_path, monkeypatch):
    def missing(*_):
        raise InputError("no model in outputs/x")

    monkeypatch.setattr(tables, "study_cells", missing)
    console = Console(record=True, width=200)
    assert tables.write_tables(["seeds"], Results(tmp_path / "results.sqlite"), console, tmp_path) == []
    assert "seeds: its files stay; no model in outputs/x" in console.export_text()


@pytest.mark.parametrize("words", [["tables", "--results", "none.sqlite"], ["tables", "rankin", "--results", "{}"]])
def test_the_command_refuses_what_is_not_there(words, tmp_path, capsys):
    store = Results(tmp_path / "results.sqlite")
    with pytest.raises(SystemExit) as stopped:
        main([word.format(store.file) for word in words])
    assert stopped.value.code == 2
    assert re.search("there is no store|Did you mean 'ranking'", capsys.readouterr().err)


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
    text = (DOCS / "benchmarks.md").read_text()
    lines = re.findall(r"^python run.py (experiment=.*model=llava15_7b[^#\n]*)", text, re.M)
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
