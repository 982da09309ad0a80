"""COCO val2014: what is in a picture, which pictures are taken, POPE's questions made from it, and CHAIR by hand."""

import json

import pytest
from PIL import Image

from experiments.inputs.errors import InputError
from experiments.tasks import CocoCaptions, CocoPope
from experiments.tasks.coco import fixed, listed, question

CATEGORIES = {1: "person", 18: "dog", 34: "frisbee", 28: "umbrella", 67: "dining table"}


def _coco(folder, objects: dict[int, list[int]], said: dict[int, str] | None = None) -> dict:
    """COCO's files and pictures, in a folder; returns the fields of a task."""
    images = folder / "val2014"
    images.mkdir()
    rows = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg", "width": 4, "height": 3} for i in objects]
    for row in rows:
        Image.new("RGB", (4, 3)).save(images / row["file_name"])
    marks = [
        {"id": n, "image_id": i, "category_id": c, "bbox": [0, 0, 1, 1]}
        for n, (i, c) in enumerate((i, c) for i, names in objects.items() for c in names)
    ]
    (folder / "instances.json").write_text(
        json.dumps(
            {"images": rows, "annotations": marks, "categories": [{"id": i, "name": n} for i, n in CATEGORIES.items()]}
        )
    )
    (folder / "captions.json").write_text(
        json.dumps({"annotations": [{"image_id": i, "id": i, "caption": text} for i, text in (said or {}).items()]})
    )
    return {"instances": str(folder / "instances.json"), "images": str(images)}


def _rows(items, answers):
    return [
        {"image": item.id, "caption": text, "objects": item.objects, "question": item.question} | item.truth
        for item, text in zip(items, answers, strict=True)
    ]


def test_in_a_picture_is_what_is_annotated_and_what_captions_mention(tmp_path):
    fields = _coco(tmp_path, {7: [1, 1], 5: [18]}, {7: "Two men with a Frisbee", 5: "It sleeps."})
    task = CocoCaptions(**fields, captions=str(tmp_path / "captions.json"))
    items = task.items()
    assert [(i.id, i.objects) for i in items] == [("5", ["dog"]), ("7", ["frisbee", "person"])]
    assert items[0].open().size == (4, 3) and items[0].question is None
    rows = _rows(items, ["A dog.", "A man throws a frisbee to a dog."])
    got = task.rates(task.counts(rows).sum(0))
    assert (got["chair_s"], got["chair_i"], got["recall"], got["precision"]) == (
        50,
        25,
        100,
        75,
    )  # one dog that is not there, of four mentions
    (file,) = task.export(rows, tmp_path / "out")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"image_id": 5, "caption": rows[0]["caption"]},
        {"image_id": 7, "caption": rows[1]["caption"]},
    ]


def test_the_fixed_list_depends_on_the_ids_alone():
    ids = list(range(1000, 3000))
    assert fixed(ids) == fixed(reversed(ids)) == sorted(fixed(ids)) and len(set(fixed(ids))) == 500
    assert fixed(ids)[:4] == [1001, 1007, 1016, 1017] and fixed([3, 1, 2]) == [1, 2, 3]


def test_operas_list_and_ones_own(tmp_path):
    opera = listed("opera")
    assert (
        len(opera) == len(set(opera)) == 500 and (opera[0], opera[-1]) == (226988, 196815) and max(opera) < 581930
    )  # COCO's largest id in val2014
    for name, text in (("a.txt", "# mine\n3, 1 2\n"), ("a.json", "[3, 1, 2]")):
        (tmp_path / name).write_text(text)
        assert listed(str(tmp_path / name)) == [3, 1, 2]
    for text, words in (
        ("3 x", "whole numbers"),
        ("3 3", "1 of them twice"),
        ("", "at least one"),
        ("[null]", "whole numbers"),
    ):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            listed(str(tmp_path / "a.txt"))
    with pytest.raises(InputError, match="null is the fixed list, opera a published one"):
        listed("oprea")


def test_own_ids_in_their_order_and_a_part(tmp_path):
    fields = _coco(tmp_path, {1: [1], 2: [18], 3: [34]}) | {
        "captions": str(tmp_path / "captions.json"),
        "ids": str(tmp_path / "ids.txt"),
    }
    (tmp_path / "ids.txt").write_text("3 1 2")
    assert [i.id for i in CocoCaptions(**fields, start=1, count=1).items()] == ["1"]
    assert [i.id for i in CocoCaptions(**fields).items()] == ["3", "1", "2"]
    with pytest.raises(InputError, match="there are 3 pictures in the list; 4 from the 0th"):
        CocoCaptions(**fields, count=4).items()
    (tmp_path / "ids.txt").write_text("3 99")
    with pytest.raises(InputError, match="1 of 2 image ids are not in .*: 99"):
        CocoCaptions(**fields).items()


def test_missing_and_broken_files(tmp_path):
    fields = _coco(tmp_path, {i: [1] for i in range(1, 6)}) | {"captions": str(tmp_path / "captions.json")}
    with pytest.raises(
        InputError, match=r"file of instances is missing: no 'nowhere'. It is published at https://cocodataset"
    ):
        CocoCaptions(**fields | {"instances": "nowhere"}).items()
    with pytest.raises(InputError, match="folder of COCO's val2014 pictures is missing"):
        CocoCaptions(**fields | {"images": "nowhere"}).items()
    for i in range(1, 6):
        (tmp_path / "val2014" / f"COCO_val2014_{i:012}.jpg").unlink()
    with pytest.raises(InputError, match=r"5 of 5 pictures are missing in .*000000000001.jpg.* and 2 more"):
        CocoCaptions(**fields).items()
    (tmp_path / "captions.json").write_text("{")
    with pytest.raises(InputError, match="file of captions .* cannot be read as JSON"):
        CocoCaptions(**fields).items()
    found = json.loads((tmp_path / "instances.json").read_text())
    found["annotations"][0]["category_id"] = 99
    (tmp_path / "instances.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="is not as COCO's: .* 99; it is published"):
        CocoCaptions(**fields).items()
    (tmp_path / "instances.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="lacks annotations, categories"):
        CocoCaptions(**fields).items()


def test_pope_counts_over_all_annotated_pictures(tmp_path):
    fields = _coco(tmp_path, {1: [18], 2: [18, 34], 3: [18, 34, 1], 4: [28]})
    (tmp_path / "ids.txt").write_text("1 4")
    task = CocoPope(**fields, ids=str(tmp_path / "ids.txt"), per_image=1)
    items = task.items()
    # beside a dog stands a frisbee twice, a person once; beside an umbrella nothing, so the most frequent: the dog,
    # three times
    assert [(i.id, i.question, i.truth["label"]) for i in items] == [
        ("1 dog", "Is there a dog in the image?", "yes"),
        ("1 frisbee", "Is there a frisbee in the image?", "no"),
        ("4 umbrella", "Is there an umbrella in the image?", "yes"),
        ("4 dog", "Is there a dog in the image?", "no"),
    ]
    assert {i.picture for i in items} == {"1", "4"}
    got = task.rates(task.counts(_rows(items, ["Yes.", "Yes, there is.", "no", "No."])).sum(0))
    assert got == {"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50, "neither": 0}
    assert [i.id for i in CocoPope(**fields, ids=str(tmp_path / "ids.txt"), per_image=1, start=1, count=1).items()] == [
        "4 umbrella",
        "4 dog",
    ]
    assert {i.picture for i in CocoPope(**fields, per_image=2).items()} == {"2", "3"}  # the others have too few
    with pytest.raises(InputError, match="kind of probes 'adverserial'. Did you mean 'adversarial'"):
        CocoPope(**fields, probes="adverserial").items()


@pytest.mark.parametrize("probes", ["random", "popular", "adversarial"])
def test_pope_items_do_not_depend_on_how_many_there_are(tmp_path, probes):
    fields = _coco(tmp_path, {i: [1, 18, 34][: 1 + i % 3] for i in range(1, 10)} | {10: [28]})
    few, many = (
        [(i.id, i.question, i.truth) for i in CocoPope(**fields, probes=probes, per_image=1, count=n).items()]
        for n in (3, 9)
    )
    assert many[: len(few)] == few and len(few) == 6


def test_articles():
    assert [question(name) for name in ("oven", "dining table")] == [
        "Is there an oven in the image?",
        "Is there a dining table in the image?",
    ]
