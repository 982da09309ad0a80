"""People's own images: every mode and size, and what cannot be read."""

import pytest
from PIL import Image

from experiments.inputs.errors import InputError
from experiments.tasks import Files, Scenes, ScenesPope


@pytest.mark.parametrize(
    "mode, size, suffix",
    [
        ("RGBA", (9, 7), "png"),
        ("CMYK", (20, 30), "jpg"),
        ("RGB", (1, 1), "png"),
        ("L", (5, 5), "png"),
        ("P", (5, 5), "gif"),
        ("I;16", (4, 4), "png"),
        ("LA", (4, 4), "png"),
    ],
)
def test_any_mode_becomes_rgb(tmp_path, mode, size, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.new(mode, size).save(file)
    (item,) = Files(str(file)).items()
    image = item.open()
    assert image.mode == "RGB" and image.size == size


def test_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "x.png")
    (item,) = Files(str(tmp_path)).items()
    assert item.open().getpixel((1, 1)) == (255, 255, 255)


def test_what_is_no_image_says_so(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    (item,) = Files(str(tmp_path)).items()
    with pytest.raises(OSError, match="no readable image"):
        item.open()


def test_the_first_that_can_be_read(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(InputError, match="no picture of .* can be read .a.jpg: no readable image"):
        Files(str(tmp_path)).first()
    Image.new("L", (5, 6)).save(tmp_path / "b.png")
    assert Files(str(tmp_path)).first().size == (5, 6)


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match="empty"):
        Files(str(tmp_path)).items()
    with pytest.raises(InputError, match="no such image"):
        Files(str(tmp_path / "nothing")).items()
    with pytest.raises(InputError, match="Unknown split of scenes 'tset'. Did you mean 'test'"):
        Scenes("tset", "typical", 0, 1).items()
    with pytest.raises(InputError, match="Unknown form of scenes 'typcal'. Did you mean 'typical'"):
        Scenes("test", "typcal", 0, 1).items()
    with pytest.raises(InputError, match="counted from 0"):
        Scenes("test", "typical", -1, 1).items()
    with pytest.raises(InputError, match="at least one"):
        Scenes("test", "typical", 0, 0).items()


def test_what_is_no_image_is_left_out_of_a_folder_and_counted(tmp_path):
    Image.new("L", (5, 6)).save(tmp_path / "b.png")
    Image.new("L", (5, 6)).save(tmp_path / "photo", format="PNG")  # an image by its content alone
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "more").mkdir()
    Image.new("L", (5, 6)).save(tmp_path / "more" / "a.png")
    task = Files(str(tmp_path))
    assert [item.id for item in task.items()] == ["b.png", "broken.jpg", "photo"]
    line = task.left_out()
    assert "left out 3 files that are no images (.DS_Store, drawing.svg, notes.txt) and 1 subfolder (more)" in line
    assert "images_recursive=true" in line
    deep = Files(str(tmp_path), recursive=True)
    assert [item.id for item in deep.items()] == ["b.png", "broken.jpg", "more/a.png", "photo"]
    assert deep.items()[2].open().size == (5, 6) and "subfolder" not in deep.left_out()
    assert Files(str(tmp_path / "more")).left_out() is None
    with pytest.raises(InputError, match=r"holds no image, but 1 file that is no image \(x.txt\)"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "x.txt").write_text("no image")
        Files(str(tmp_path / "none")).items()


def test_16_bit_greyscale_keeps_its_shades(tmp_path):
    Image.new("I;16", (3, 3), 20000).save(tmp_path / "x.png")
    (item,) = Files(str(tmp_path)).items()
    assert 76 <= item.open().getpixel((1, 1))[0] <= 79


def test_items_do_not_depend_on_how_many_there_are():
    """What the store holds of few is part of what it is to hold of many."""
    few, many = (
        [(i.id, i.question, i.truth) for i in ScenesPope("validation", "typical", "adversarial", 0, n).items()]
        for n in (5, 30)
    )
    assert many[: len(few)] == few and len(few) > 10


def test_answers_are_scored_by_what_was_asked():
    task = ScenesPope("validation", "typical", "random", 0, 20)
    rows = [
        {"image": i.id, "caption": "Yes." if i.truth["label"] == "yes" else "No, there is none.", **i.truth}
        for i in task.items()
    ]
    assert task.rates(task.counts(rows).sum(0)) == {
        "accuracy": 100,
        "precision": 100,
        "recall": 100,
        "f1": 100,
        "yes": 50,
        "neither": 0,
    }
    assert all(
        (i.truth["label"] == "yes") == (i.id.split(" ", 1)[1] in i.objects) and i.picture in i.id for i in task.items()
    )
