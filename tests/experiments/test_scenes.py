"""Scenes come from their seeds alone, are the same everywhere, keep their splits apart, and what is said of them is
true.
"""

import argparse

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from experiments.metrics import chair
from experiments.scenes import frozen, language, picture, train, world
from experiments.scenes.training import data as training

drawn = st.builds(
    world.draw, st.sampled_from(list(world.SPLITS)), st.sampled_from(list(world.FORMS)), st.integers(0, 10**6)
)


def key(scene):
    return scene.kind, tuple(scene.things)


def test_a_scene_is_the_same_every_time():
    a, b = world.draw("test", "typical", 7), world.draw("test", "typical", 7)
    assert a == b and np.array_equal(world.render(a), world.render(b))
    assert world.render(a).size == (world.SIZE, world.SIZE)


def test_fixed_scenes_are_drawn_as_they_were():
    assert (
        list(frozen.changed([(split, form, i) for split, form in frozen.SETS for i in range(0, frozen.COUNT, 40)]))
        == []
    )


@pytest.mark.slow
def test_all_fixed_scenes_are_drawn_as_they_were():
    assert list(frozen.changed(frozen.fixed())) == []


def test_a_scene_drawn_otherwise_is_noticed(monkeypatch):
    monkeypatch.setattr(world, "MEMBER", 0.5)
    assert list(frozen.changed([("test", "typical", i) for i in range(20)]))


@pytest.fixture(scope="module")
def trained():
    """The first scenes of training."""
    return [training.scene(i) for i in range(600)]


@pytest.fixture(scope="module")
def tested():
    return [world.draw("test", "typical", i) for i in range(300)]


def held(scene):
    return [t for t in scene.things if t.drawing == len(world.drawings()[t.name]) - 1]


def test_every_category_has_a_drawing_that_only_the_test_split_has(trained, tested):
    assert len(world.CATEGORIES) == 80 and all(len(d) >= 2 for d in world.drawings().values())
    different = [
        np.asarray(a).tobytes() != np.asarray(d[-1]).tobytes() for d in world.drawings().values() for a in d[:-1]
    ]
    assert all(different)
    validation = [world.draw("validation", form, i) for form in world.FORMS for i in range(100)]
    assert not any(held(s) for s in [*trained, *validation])
    share = np.mean([t in held(s) for s in tested for t in s.things])
    assert 0.15 < share < 0.25


def test_the_largest_things_are_only_in_the_test_split(trained, tested):
    def over(scene):
        return [t for t in scene.things if t.size > (70 if t.name in world.BIG else 53)]

    assert not any(over(s) for s in trained)
    share = np.mean([t in over(s) for s in tested for t in s.things])
    assert 0.03 < share < 0.12


def test_splits_share_no_scene(trained):
    others = [key(world.draw(split, form, i)) for split, form in frozen.SETS for i in range(80)]
    assert not set(map(key, trained)) & {k for k in others if k[1]}
    full = [k for k in others if k[1]]
    assert len(set(full)) == len(full)


@pytest.mark.slow
def test_no_fixed_scene_was_trained_on():
    trained = {key(training.scene(i)) for i in range(train.IMAGES)}
    assert not trained & {k for k in (key(world.draw(*place)) for place in frozen.fixed()) if k[1]}


def test_companions_are_missing_in_absent_scenes():
    absent = [world.draw("test", "absent", i) for i in range(100)]
    assert np.mean([bool(s.missing) for s in absent]) > 0.6
    assert not any(set(s.missing) & set(s.objects) for s in absent)
    assert not any(world.draw("test", "typical", i).missing for i in range(20))


def test_crowded_scenes_are_crowded():
    counts = [len(world.draw("validation", "crowded", i).objects) for i in range(100)]
    assert np.mean(counts) > 10 and max(counts) <= 14


def test_cooccurrence_is_skewed():
    rooms = [s for s in (world.draw("validation", "typical", i) for i in range(600)) if s.kind == "dining room"]
    with_fork = [s for s in rooms if "fork" in s.objects]
    assert len(with_fork) > 10 and np.mean(["knife" in s.objects for s in with_fork]) > 0.7


def test_kinds_of_scenes_name_no_object():
    assert len(world.KINDS) >= 16
    assert not any(
        chair.mentions(f"The image shows a {kind}. {word}.")
        for kind in world.KINDS
        for word in (*world.COLOURS, *world.ROWS, *world.COLUMNS, "small", "large", "side", "corner")
    )


@given(drawn, st.sampled_from(list(language.PROMPTS)), st.integers(0, 9))
def test_captions_are_true_and_read_back(scene, kind, variant):
    caption = language.caption(scene, kind, variant)
    scored = chair.score(caption, scene.objects)
    assert not scored.hallucinated
    if kind != "short":
        assert scored.named == set(scene.objects)
    found = list(language.claims(caption))
    assert all(claim.true(scene) for claim in found)
    if kind == "detailed":
        assert {c.name for c in found if c.kind == "position"} == set(scene.objects)
    if kind != "short":
        assert {c.name for c in found if c.kind == "count"} == set(scene.objects)


@given(drawn)
def test_questions_are_true(scene):
    for q in [*language.questions(scene, 6), *language.about(scene)]:
        things = scene.of(q.name)
        if q.kind == "existence":
            assert (q.answer == "yes") == bool(things) and q.sentence.lower().startswith(q.answer)
        else:
            (claim,) = [c for c in language.claims(q.sentence) if c.kind == q.kind]
            assert claim.true(scene) and q.answer in q.sentence


def test_false_claims_are_found():
    scene = next(
        s for s in (world.draw("test", "typical", i) for i in range(50)) if "car" in s.objects and len(s.of("car")) == 1
    )
    (car,) = scene.of("car")
    row, column = car.cell
    wrong = language.PLACES[2 - row if row != 1 else 0, column][0]
    colour = next(c for c in world.COLOURS if c != car.colour)
    told = {c.kind: c.true(scene) for c in language.claims(f"There are two {colour} cars {wrong}.")}
    assert told == {"count": False, "colour": False, "position": False}
    assert all(c.true(scene) is None for c in language.claims("There is a small zebra at the top.")) or scene.of(
        "zebra"
    )


def test_half_of_the_questions_on_existence_have_the_answer_yes():
    pairs = [
        q
        for i in range(300)
        for q in language.questions(world.draw("validation", "typical", i), 4)
        if q.kind == "existence"
    ]
    assert 0.42 < np.mean([q.answer == "yes" for q in pairs]) < 0.58


def test_patches_follow_their_owner():
    scene = world.draw("test", "typical", 3)
    owners = world.patch_owners(scene)
    assert owners.shape == (world.SIZE // world.PATCH,) * 2 and owners.size >= 196
    assert set(owners[owners >= 0].tolist()) <= set(range(len(scene.things))) and (owners >= 0).any()
    attributes = training.attributes(scene)
    assert {world.CATEGORIES[i] for i in attributes[:, 0] if i >= 0} <= set(scene.objects)


# ------------------------------------------------------------------------------------------------- training


def settings(work, out, **changes):
    values = dict(
        images=40,
        variants=2,
        sight_steps=4,
        sight_batch=4,
        speech_steps=4,
        speech_batch=4,
        seed=3,
        device="cpu",
        precision="fp32",
        compile=False,
        save_every=0,
        work=work,
        out=out,
        processes=2,
    )
    return argparse.Namespace(**values | changes)


def work(folder):
    """A work folder that has a tokenizer, which takes longest to make."""
    AutoProcessor.from_pretrained(train.MODEL).save_pretrained(training.rendered(folder) / "processor")
    return folder


@pytest.mark.slow
def test_training_that_was_stopped_ends_in_the_same_weights(tmp_path, monkeypatch):
    train.train(settings(work(tmp_path / "a"), tmp_path / "whole"))
    steps = []

    def counted(loss, stop):
        def call(*args):
            steps.append(loss.__name__)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return loss(*args)

        return call

    losses = {name: getattr(train, name) for name in ("sight_loss", "speech_loss")}
    work(tmp_path / "b")
    for stop in (3, 5, None):  # stopped before the third step of sight, and, three steps on, before the third of speech
        steps.clear()
        for name, loss in losses.items():
            monkeypatch.setattr(train, name, counted(loss, stop))
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train.train(settings(tmp_path / "b", tmp_path / "resumed"))
            assert not (tmp_path / "resumed").exists()
        else:
            train.train(settings(tmp_path / "b", tmp_path / "resumed"))
    assert steps == ["speech_loss"] * 2  # what was done is not done again
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_seed_makes_its_own_weights(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for seed, out in ((1, one), (2, other)):
        train.train(settings(work(tmp_path / "work"), out, seed=seed, images=8, sight_steps=1, speech_steps=1))
    a, b = (load_file(f / "model.safetensors") for f in (one, other))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_texts_see_the_picture_and_themselves_alone(tmp_path):
    processor = AutoProcessor.from_pretrained(train.MODEL)
    args = settings(work(tmp_path), None)
    form = train.form(processor)
    data = training.Data(training.rendered(tmp_path), args.images, args.variants, form, 1)
    batch = data.batch(np.arange(4), 1, "cpu")
    tokens, learn, positions, mask = batch.tokens, batch.learn, batch.positions, batch.mask
    n = len(data.prefix)
    number = torch.tensor(data.texts[1, :4, 1]).long()
    for row in range(4):
        for i in range(0, form.text, 7):
            sees = mask[row, 0, n + i]
            assert not sees[n + i + 1 :].any() and sees[n + i]
            if number[row, i]:
                assert sees[:n].all() and (number[row, : i + 1][sees[n : n + i + 1]] == number[row, i]).all()
    first = number[0] == 1
    assert torch.equal(positions[0, n:][first], torch.arange(n, n + int(first.sum())))
    said = processor.tokenizer.decode(tokens[0, n:][learn[0, n:] & first])
    assert said.strip().removesuffix("</s>").strip() == language.caption(training.scene(0), "detailed", 1)


def test_a_scene_is_written_as_a_picture(tmp_path, capsys):
    words = ["--split", "test", "--form", "crowded", "--index", "3", "--out"]
    assert picture.main([*words, str(tmp_path / "new/scene.png")]) == 0
    scene = world.draw("test", "crowded", 3)
    assert np.array_equal(Image.open(tmp_path / "new/scene.png"), world.render(scene))
    out = capsys.readouterr().out
    assert scene.id in out and ", ".join(scene.objects) in out
    (tmp_path / "file").touch()
    for wrong, said in (
        ("scene.txt", "FILE.png or FILE.jpg"),
        ("scene", "FILE.png"),
        ("file/scene.png", "cannot write"),
    ):
        assert picture.main(["--out", str(tmp_path / wrong)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert picture.main(["--index", "-1", "--out", str(tmp_path / "scene.png")]) == 2
    assert not (tmp_path / "scene.png").exists()
