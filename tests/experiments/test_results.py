"""The store of results: nothing twice, nothing lost, whoever writes."""

import json
import multiprocessing
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from experiments import results
from experiments.inputs.errors import InputError
from experiments.results import Results
from experiments.results.__main__ import main as store_command

SCENES = {"_target_": "experiments.tasks.Scenes", "split": "validation", "form": "typical"}


def row(image, caption="A dog is here.", objects=("dog",)):
    return {
        "image": image,
        "picture": image,
        "stack": "[]",
        "question": None,
        "caption": caption,
        "objects": list(objects),
    }


def test_the_same_settings_are_the_same_run(tmp_path):
    store = Results(tmp_path / "a/results.sqlite")
    one = store.open("[]", {"seed": 0, "task": {"split": "test"}})
    assert (
        store.open("[]", {"task": {"split": "test"}, "seed": 0}).id
        == one.id
        != store.open("[]", {"task": {"split": "test"}, "seed": 1}).id
    )
    assert store.runs() == []  # nothing is kept of a run without answers
    store.add(one, [row("a")])
    (kept,) = store.runs()
    assert (
        kept == store.open("[]", one.config) == replace(one, count=1)
        and kept.code == results.code()
        and kept.versions["torch"]
    )


def test_an_answer_is_kept_once(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    run = store.open("[]", {})
    store.add(run, [row("a"), row("b")])
    store.add(run, [row("b", "another"), row("c")])
    assert [r["image"] for r in store.rows(run)] == ["a", "b", "c"] and store.rows(run)[1][
        "caption"
    ] == "A dog is here."
    assert [r["image"] for r in store.rows(run, ["c", "d", "a"])] == ["c", "a"]
    assert store.done(run) == {"a", "b", "c"} and store.run(run.id).count == 3


def test_answers_are_in_one_order_whenever_they_came(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    run, names = store.open("[]", {}), ["2", "10", "a2", "a10", "a10 1"]
    store.add(run, [row(name) for name in reversed(names)])
    assert [r["image"] for r in store.rows(run)] == names
    assert [r["image"] for r in store.rows(run, ["a2", "none", "2"])] == ["a2", "2"]


def test_a_batch_is_kept_whole_or_not(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    run = store.open("[]", {})
    with pytest.raises(KeyError):
        store.add(run, [row("a"), {"caption": "without an image"}])
    assert store.rows(run) == []


def _open(file, barrier):
    barrier.wait()
    Results(file)


def test_a_store_is_made_once(tmp_path):
    """Jobs of a launcher start together."""
    context = multiprocessing.get_context("fork")
    for number in range(40):
        barrier = context.Barrier(4)
        processes = [context.Process(target=_open, args=(tmp_path / f"{number}.sqlite", barrier)) for _ in range(4)]
        for process in processes:
            process.start()
        assert [process.join(60) or process.exitcode for process in processes] == [0] * 4


def test_a_store_of_someone_else_runs_nothing(tmp_path, command):
    store = Results(tmp_path / "results.sqlite")
    for target in (
        {"_target_": "shutil.copyfile", "src": __file__, "dst": str(tmp_path / "copy")},
        SCENES | {"split": {"_target_": "shutil.copyfile", "src": __file__, "dst": str(tmp_path / "copy")}},
    ):
        pair = [store.open("[]", {"task": target, "seed": seed}) for seed in (0, 1)]
        for run in pair:
            store.add(run, [row("a")])
        done = command(store.file, "compare", *(run.id for run in pair))
        assert done.returncode == 2 and "describes no Task" in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "copy").exists()


def test_only_answers_to_the_same_questions_are_compared(tmp_path, command):
    store = Results(tmp_path / "results.sqlite")
    pair = [store.open("[]", {"task": SCENES | {"form": form}}) for form in ("typical", "crowded")]
    for run in pair:
        store.add(run, [row("a")])
    assert "only runs of one task" in command(store.file, "compare", *(run.id for run in pair)).stderr


def _write(file, start):
    store = Results(file)
    run = store.open("[]", {})
    for k in range(start, start + 40):
        store.add(run, [row(f"{k}"), row("everyone's")])


def test_many_processes_write_at_once(tmp_path):
    file = tmp_path / "results.sqlite"
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.starmap(_write, [(file, 100 * k) for k in range(8)])
    store = Results(file)
    assert len(store.runs()) == 1 and len(store.rows(store.runs()[0])) == 321


def test_answers_of_other_code_are_known(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    run = store.open("[]", {})
    store.add(run, [row("a"), row("b")])
    with closing(sqlite3.connect(store.file)) as base, base:
        base.execute("UPDATE answers SET code = 'older' WHERE item = 'a'")
    assert {k: n for k, n in store.codes([run.id]).items() if k != results.code()} == {"older": 1}


def test_what_is_no_store_says_so(tmp_path):
    (tmp_path / "results.sqlite").write_text("no database, and long enough to be taken for none at all" * 30)
    with pytest.raises(InputError, match="cannot be used as the store"):
        Results(tmp_path / "results.sqlite")
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as base, base:
        base.execute("CREATE TABLE runs (id TEXT)")
    with pytest.raises(InputError, match="a database of something else"):
        Results(tmp_path / "other.sqlite")
    with pytest.raises(InputError, match="0 runs .* begin with 'zz'"):
        Results(tmp_path / "b.sqlite").run("zz")


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m experiments.results` in this process: a store and words, to its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(file, *words):
        monkeypatch.setattr(sys, "argv", ["results", "--results", str(file), *words])
        code = 0
        try:
            store_command()
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


def test_the_command_lists_filters_compares_and_exports(tmp_path, command):
    store = Results(tmp_path / "results.sqlite")
    plain = store.open(
        "[]", {"decoder": {}, "task": SCENES, "search": {"num_beams": 1, "do_sample": False}, "model": {"path": "m"}}
    )
    other = store.open(
        "[x]",
        {
            "decoder": {"x": {"_target_": "a.X", "r": 0.4}},
            "task": SCENES,
            "search": {"num_beams": 1, "do_sample": False},
            "model": {"path": "m"},
        },
    )
    store.add(plain, [row(str(i), "A dog and a cat.") for i in range(10)])
    store.add(other, [row(str(i)) for i in range(2, 12)])
    listed = command(store.file, "list")
    assert plain.id in listed.stdout and other.id in listed.stdout
    assert plain.id not in command(store.file, "list", "decoder=[x]", "validation").stdout
    assert (
        other.id
        in command(
            store.file, "list", "decoder.x.r=0.40", "search=greedy", "task.split=validation", "search.do_sample=false"
        ).stdout
    )
    for nothing in ("decoder.x.r=0.45", "search=beam", "task.split=test"):
        assert (found := command(store.file, "list", nothing)).returncode == 0 and other.id not in found.stdout
    assert "Did you mean 'task.split'" in command(store.file, "list", "task.spit=test").stderr
    assert "Did you mean 'decoder'" in command(store.file, "list", "decoders=[x]").stderr
    compared = command(store.file, "compare", plain.id, other.id[:6])
    assert "n = 8 pictures;" in compared.stdout and "-100.0 [-100.0, -100.0]" in compared.stdout, compared.stderr
    assert [json.loads(line)["image"] for line in command(store.file, "export", other.id).stdout.splitlines()] == [
        str(i) for i in range(2, 12)
    ]
    assert json.loads(command(store.file, "show", plain.id).stdout)["label"] == "[]"
    assert "there is no store" in command(tmp_path / "none.sqlite").stderr


def test_the_list_names_the_task_of_each_run_and_where_tasks_differ(tmp_path, command):
    store = Results(tmp_path / "results.sqlite")
    crowded = SCENES | {"form": "crowded"}
    tasks = {"Scenes form=typical": SCENES, "Scenes form=crowded": crowded, "images": {"image": "/a"}}
    for task in tasks.values():
        store.add(store.open("[]", {"task": task}), [row("a")])
    lines = command(store.file, "list").stdout.splitlines()
    head = next(line for line in lines if "begun" in line)
    at = [name.strip() for name in re.split("[┃│]", head)].index("task")
    cells = [re.split("[┃│]", line)[at].strip() for line in lines if line.startswith("│")]
    assert sorted(cells) == sorted(tasks)
    assert not any("task.form" in line for line in lines)  # it stands in one column
