"""People's own images: every mode and size, and what cannot be read."""

import pytest
from PIL import Image

from experiments import data
from experiments.errors import InputError


@pytest.mark.parametrize("mode, size, suffix", [("RGBA", (9, 7), "png"), ("CMYK", (20, 30), "jpg"), ("RGB", (1, 1), "png"), ("L", (5, 5), "png"), ("P", (5, 5), "gif"), ("I;16", (4, 4), "png"), ("LA", (4, 4), "png")])
def test_any_mode_becomes_rgb(tmp_path, mode, size, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.new(mode, size).save(file)
    (item,) = data.files(str(file))
    image = item.open()
    assert image.mode == "RGB" and image.size == size


def test_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "x.png")
    (item,) = data.files(str(tmp_path))
    assert item.open().getpixel((1, 1)) == (255, 255, 255)


def test_what_is_no_image_says_so(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    (item,) = data.files(str(tmp_path))
    with pytest.raises(OSError, match="no readable image"):
        item.open()


def test_the_first_that_can_be_read(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(InputError, match="no picture of .* can be read .a.jpg: no readable image"):
        data.first(str(tmp_path))
    Image.new("L", (5, 6)).save(tmp_path / "b.png")
    assert data.first(str(tmp_path)).size == (5, 6)


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match="empty"):
        list(data.files(str(tmp_path)))
    with pytest.raises(InputError, match="no such image"):
        list(data.files(str(tmp_path / "nothing")))
    with pytest.raises(InputError, match="Unknown split of scenes 'tset'. Did you mean 'test'"):
        list(data.scenes("tset", "typical", 0, 1))
    with pytest.raises(InputError, match="Unknown form of scenes 'typcal'. Did you mean 'typical'"):
        list(data.scenes("test", "typcal", 0, 1))
    with pytest.raises(InputError, match="counted from 0"):
        list(data.scenes("test", "typical", -1, 1))
    with pytest.raises(InputError, match="at least one"):
        list(data.scenes("test", "typical", 0, 0))


def test_16_bit_greyscale_keeps_its_shades(tmp_path):
    Image.new("I;16", (3, 3), 20000).save(tmp_path / "x.png")
    (item,) = data.files(str(tmp_path))
    assert 76 <= item.open().getpixel((1, 1))[0] <= 79
