"""Scenes come from their seeds alone, and what is said of them is true."""

import numpy as np

from experiments.scenes import language, world


def test_a_scene_is_the_same_every_time():
    a, b = world.draw("typical", 7), world.draw("typical", 7)
    assert a == b and np.array_equal(world.render(a), world.render(b))
    assert world.render(a).size == (world.SIZE, world.SIZE)


def test_splits_share_no_scene():
    layouts = [tuple(str(t) for t in world.draw(split, i).things) for split in world.SPLITS for i in range(60)]
    full = [layout for layout in layouts if layout]
    assert len(set(full)) == len(full)


def test_companions_are_missing_in_absent_scenes():
    usual = [bool(world.draw("absent", i).missing) for i in range(100)]
    assert np.mean(usual) > 0.6
    assert not any(set(s.missing) & set(s.objects) for s in (world.draw("absent", i) for i in range(100)))


def test_cooccurrence_is_skewed():
    scenes = [s for s in (world.draw("typical", i) for i in range(600)) if s.kind == "dining room"]
    with_fork = [s for s in scenes if "fork" in s.objects]
    share = np.mean(["knife" in s.objects for s in with_fork])
    assert len(with_fork) > 10 and share > 0.7


def test_questions_are_balanced_and_true():
    for i in range(50):
        scene = world.draw("validation", i)
        pairs = language.questions(scene, 4)
        for question, answer in pairs:
            asked = [n for n in world.CATEGORIES if f" {language.singular(n)} in" in question]
            assert answer.startswith("Yes") == (asked[0] in scene.objects)


def test_patch_labels_follow_the_owner():
    scene = world.draw("typical", 3)
    labels = world.patch_labels(scene)
    named = {world.CATEGORIES[i] for i in labels[labels >= 0]}
    assert named and named <= set(scene.objects)
