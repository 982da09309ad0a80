"""MMHal-Bench and MM-Vet: items and exports in their own formats; and every yaml of a task."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from experiments.inputs.errors import InputError
from experiments.tasks import Files, MMHal, MMVet, Scenes, ScenesPope, Task

TASKS = Path(__file__).parents[2] / "conf" / "task"


def _rows(items, answers):
    return [
        {"image": i.id, "question": i.question, "caption": text} | i.truth
        for i, text in zip(items, answers, strict=True)
    ]


def _mmhal(folder):
    records = [
        {
            "question_type": kind,
            "question_topic": "food",
            "image_id": f"{n:016x}",
            "image_src": f"https://c1.example.com/8/{n}_o.jpg?x=1",
            "image_content": ["Cat"],
            "question": f"Q{n}?",
            "gt_answer": f"A{n}.",
            "model_answer": "",
        }
        for n, kind in enumerate(("attribute", "adversarial", "comparison"))
    ]
    for n in range(3):
        Image.new("RGB", (2, 2)).save(folder / f"{n}_o.jpg")
    (folder / "response_template.json").write_text(json.dumps(records))
    return records, str(folder / "response_template.json")


def test_mmhal(tmp_path):
    records, file = _mmhal(tmp_path)
    task = MMHal(file, str(tmp_path), start=1)
    items = task.items()
    assert [(i.id, i.question, i.picture) for i in items] == [("1", "Q1?", "1_o.jpg"), ("2", "Q2?", "2_o.jpg")]
    assert items[0].truth == {"question_type": "adversarial", "image_content": ["Cat"], "gt_answer": "A1."}
    rows = _rows(items, ["Two words.", "One more word here."])
    assert task.rates(task.counts(rows).sum(0)) == {"words": 3}
    (out,) = task.export(rows, tmp_path / "out")
    assert json.loads(out.read_text()) == [
        records[0],
        records[1] | {"model_answer": "Two words."},
        records[2] | {"model_answer": "One more word here."},
    ]
    (tmp_path / "2_o.jpg").unlink()
    with pytest.raises(
        InputError,
        match="1 of 2 pictures are missing .*2_o.jpg; MMHal-Bench's pictures are published at https://huggingface.co",
    ):
        task.items()
    Path(file).write_text('[{"question": "?"}]')
    with pytest.raises(InputError, match="record 0 of .* lacks question_type, image_src, image_content, gt_answer"):
        task.items()


def test_mmvet(tmp_path):
    rows = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png",
            "question": f"What is {n}?",
            "answer": "1<OR>one",
            "imagesource": "",
            "capability": ["ocr", "math"],
        }
        for n in range(2)
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    for row in rows.values():
        Image.new("P", (2, 2)).save(tmp_path / row["imagename"])
    task = MMVet(str(tmp_path / "mm-vet.json"), str(tmp_path))
    items = task.items()
    assert [(i.id, i.question, i.truth) for i in items] == [
        (name, row["question"], {"gt_answer": "1<OR>one", "capability": ["ocr", "math"]}) for name, row in rows.items()
    ]
    assert items[0].open().mode == "RGB"
    (out,) = task.export(_rows(items, ["naught", "it is «1»"]), tmp_path / "out")
    assert json.loads(out.read_text()) == {"v1_0": "naught", "v1_1": "it is «1»"}
    (tmp_path / "mm-vet.json").write_text('{"v1_0": {}}')
    with pytest.raises(InputError, match="'v1_0' of .* lacks imagename, question, answer"):
        task.items()


@pytest.mark.parametrize("file", sorted(TASKS.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_yaml_makes_a_task_that_says_where_its_data_are(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = instantiate(OmegaConf.load(file))
    assert isinstance(task, Task) and task.title and task.metrics
    if not isinstance(task, (Scenes, ScenesPope, Files)):
        with pytest.raises(InputError, match="is missing: no 'data/.*published at https://"):
            task.items()
