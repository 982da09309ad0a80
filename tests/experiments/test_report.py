"""The page of runs: made of a store that was really filled, and driven in a browser."""

import base64
import gzip
import html
import io
import json
import os
import re
import shutil
import sys

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from decoders import Stack
from experiments import models
from experiments.inputs.conf_files import CONF
from experiments.inputs.errors import InputError
from experiments.probes.watch import Watch
from experiments.report import __main__ as report
from experiments.report import again, build
from experiments.report.page import Said, Seen, Shown
from experiments.report.page import html as written
from experiments.results import Results
from experiments.runner import generate

HOSTILE = "A dog </script><img src=x onerror=\"document.title='owned'\"> & a <b>cat</b> \u2028."
SETTINGS = {
    "max_new_tokens": 24,
    "seed": 0,
    "search": {"do_sample": False, "num_beams": 1},
    "task": {"_target_": "experiments.tasks.Scenes", "split": "validation", "form": "typical"},
}
STACKS = {"[]": {}, "[prunehal]": {"prunehal": {"_target_": "prunehal.PruneHal", "r": 0.4, "t": 3}}}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with two stacks on six scenes, its page with maps of five, and what recorders told beside it. One picture
    has answers that no model gave.
    """
    folder = tmp_path_factory.mktemp("report")
    store = Results(folder / "results.sqlite")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        model = models.identity(hydra.compose("run").model)
    entry = models.entry("scenes")
    items = again.task({"task": SETTINGS["task"] | {"count": 6}}).items()
    speaker = generate.Speaker(*models.load(entry), entry.prompt, SETTINGS["search"] | {"max_new_tokens": 24}, QUIET, 8)
    told, runs = {}, {}
    for label, decoder in STACKS.items():
        runs[label] = store.open(label, SETTINGS | {"model": model, "decoder": decoder})
        plan = generate.plan(OmegaConf.create(decoder))
        plan = generate.Plan(plan.label, Stack([*plan.stack.decoders, Watch(maps=8)]))
        opened = [(item, item.open()) for item in items]
        rows, _ = generate.answers(speaker, plan, opened, generate.batch(speaker, opened))
        told[label] = {item.id: plan.stack.record["watch"][i] for i, item in enumerate(items)}
        last = rows[-1] | {
            "caption": HOSTILE if decoder else "A dog.",
            "objects": ["dog"],
            "hallucinated": ["cat"] if decoder else [],
            "rollbacks": [{"at": 9, "anchor": 3, "kept": 5}] if decoder else [],
        }
        last["mentions"] = [
            {"words": w, "object": w, "start": (at := last["caption"].find(w)), "end": at + 3, "token": 0}
            for w in ("dog", "cat")
            if w in last["caption"]
        ]
        store.add(runs[label], [row | {"seconds": 0.1} for row in [*rows[:-1], last]])
    page, stopped = build.page(store, build.labelled(list(runs.values())), QUIET, maps=6, batch_size=6)
    assert not stopped
    (folder / "page.html").write_text(written(page), encoding="utf-8")
    return store, runs, told, page, folder / "page.html"


def test_maps_are_those_that_the_recorder_told(made):
    _, _, told, page, _ = made
    for shown in page.pictures[:5]:
        for said in shown.said:
            seen, expected = said.seen, told[said.label][shown.id]
            assert isinstance(seen, Seen), seen
            m, g, p = expected["maps"][: said.row["tokens"]].shape
            data = gzip.decompress(base64.b64decode(seen.blob))
            largest, sums = np.frombuffer(data, "<f4", 2 * m * g).reshape(2, m, g)
            weights = np.frombuffer(data, np.uint8, m * g * p, 8 * m * g).reshape(m, g, p)
            left = np.frombuffer(data, np.uint8, -1, 8 * m * g + m * g * p).reshape(-1, g, p)
            exact = expected["maps"][:m].float().numpy()
            assert np.abs(weights / 255 * largest[..., None] - exact).max() <= largest.max() / 500 and np.allclose(
                sums, exact.sum(-1), atol=1e-5
            )
            assert seen.left_from == [1, *(prune["step"] for prune in said.row["prunes"])] and len(left) == len(
                seen.left_from
            )
            assert [one.sum() // 255 // g for one in left] == [196, *(prune["kept"] for prune in said.row["prunes"])]
            for k, start in enumerate(seen.left_from):
                assert (left[k] > 0).tolist() == (expected["left"][start - 1] > 0).tolist()
    assert sum(len(shown.said[1].row["prunes"]) for shown in page.pictures) >= 6
    known = [shown.said[1] for shown in page.pictures[:5]]
    assert all(
        said.curve[: len(said.row["attention"])] == pytest.approx(said.row["attention"], rel=2e-3) for said in known
    )  # as the store has it


def test_words_know_the_token_that_began_them(made):
    _, _, _, page, _ = made
    for shown in page.pictures[:5]:
        for said in shown.said:
            assert said.seen.ends[-1] == len(said.row["caption"]) and len(said.seen.ends) == said.row["tokens"]
            assert (
                [said.seen.token(m["start"]) for m in said.row["mentions"]]
                == [m["token"] for m in said.row["mentions"]]
                != []
            )
            assert "".join(text for _, _, texts in said.pieces for text, _ in texts) == said.row["caption"]


def test_tokens_end_where_they_do_also_within_letters_and_behind_spaces():
    pieces = {0: b" A", 1: b" caf", 2: b"\xc3", 3: b"\xa9", 4: b" \xf0\x9f", 5: b"\x90\xb6", 6: b".", 7: b" "}
    decode = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")  # noqa: E731
    for tokens in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7] * 9):
        text = decode(tokens).strip()
        lengths = [len(decode(tokens[: k + 1])) - 1 for k in range(len(tokens))]
        found = again.ends(tokens, text, decode)
        whole = [k for k in range(len(tokens)) if not decode(tokens[: k + 1]).endswith("\ufffd")]
        assert [found[k] for k in whole] == [min(lengths[k], len(text)) for k in whole] and found[-1] == len(text)
    assert again.ends([0, 1], "Another", decode) is None


def test_another_caption_has_no_map(made):
    _, _, _, page, _ = made
    assert all(said.seen.startswith("another caption came out") for said in page.pictures[5].said)
    assert any("2 captions have none" in note for note in page.notes)


class Taken:
    def __init__(self, **options):
        self.image_processor = OmegaConf.create(options)


@pytest.mark.parametrize(
    ("inputs", "taken", "size", "count", "expected"),
    [
        (
            {"pixel_values": torch.zeros(2, 3, 8, 8)},
            {"size": {"height": 8, "width": 8}},
            (40, 20),
            16,
            (4, 4, [0, 0, 1, 1]),
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 8, 8)},
            {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True},
            (40, 20),
            16,
            (4, 4, [0.25, 0, 0.5, 1]),
        ),
        ({"image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]])}, {"size": {}}, (40, 20), 8, (4, 2, [0, 0, 1, 1])),
        ({"pixel_values": torch.zeros(2, 4, 3, 8, 8)}, {"size": {}}, (20, 20), 64, "tiles"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, {"size": {}}, (20, 20), 15, "15 visual tokens"),
    ],
)
def test_where_patches_lie(inputs, taken, size, count, expected):
    config = OmegaConf.create({"vision_config": {"spatial_merge_size": 2}})
    found = again.patches(config, Taken(**taken), inputs | {"input_ids": torch.zeros(2, 30)}, 1, size, count)
    assert expected in found if isinstance(expected, str) else found == expected


def test_what_does_not_go_on_one_page_is_refused(made, tmp_path, monkeypatch, capsys):
    store, runs, *_ = made
    other = store.open("[]", SETTINGS | {"task": SETTINGS["task"] | {"form": "crowded"}})
    with pytest.raises(InputError, match="only runs of one task"):
        build.together(store, build.labelled([runs["[]"], other]))
    empty = store.open("[]", SETTINGS | {"seed": 7})
    with pytest.raises(InputError, match="no picture in common.*has 0"):
        build.together(store, build.labelled([runs["[]"], empty]))
    assert list(build.labelled([runs["[]"], empty]))[1] == "[] seed=7"
    for words, says in (
        (["zz"], "0 runs of"),
        ([str(tmp_path)], "no run of the folder"),
        ([runs["[]"].id, "--attention", "-1"], "--attention is an integer >= 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *words, "--results", str(store.file)])
        with pytest.raises(SystemExit, match="2"):
            report.main()
        assert says in " ".join(capsys.readouterr().err.split())


def test_folders_name_their_runs(made, tmp_path):
    store, runs, *_ = made
    (tmp_path / "study.json").write_text(
        json.dumps({"study": "x", "cells": {"a": runs["[prunehal]"].id, "b": runs["[]"].id}})
    )
    assert [run.label for run in report.named(store, [str(tmp_path), runs["[]"].id[:8]])] == ["[prunehal]", "[]"]
    (mine := tmp_path / "mine").mkdir()
    own = store.open("[]", SETTINGS | {"folder": str(mine.resolve())})
    store.add(own, store.rows(runs["[]"])[:1])
    assert [run.id for run in report.named(store, [str(mine)])] == [own.id]


def test_without_maps_no_model_is_loaded_and_pictures_may_be_missing(made, tmp_path, monkeypatch, capsys):
    """Pictures of one's own, one of which is gone: shown without it."""
    store = made[0]
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("none")
    run = store.open("[]", SETTINGS | {"task": {"image": str(tmp_path)}, "decoder": {}, "model": {"path": "nowhere"}})
    row = {
        "question": None,
        "objects": None,
        "mentions": [],
        "hallucinated": None,
        "prunes": [],
        "rollbacks": [],
        "tokens": 3,
        "seconds": 0.1,
    }
    store.add(
        run,
        [
            row | {"image": name, "picture": name, "stack": "[]", "caption": "<i>Red.</i>"}
            for name in ("a.png", "b.png", "c.png")
        ],
    )
    monkeypatch.setattr(models, "load", lambda config: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        sys,
        "argv",
        ["report", run.id, "--results", str(store.file), "--out", str(tmp_path / "new/page.html"), "--attention", "0"],
    )
    with pytest.raises(SystemExit, match="0"):
        report.main()
    text = (tmp_path / "new/page.html").read_text()
    assert (
        text.count("data:image/webp") == 1
        and "no readable image" in text
        and "the task does not have it any more" in text
    )
    assert "&lt;i&gt;Red.&lt;/i&gt;" in text and "<i>" not in text and "No maps of attention were made" in text


def test_ctrl_c_still_writes_the_page(made, tmp_path, monkeypatch, capsys):
    store, runs, *_ = made
    real, calls = again._again, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:  # the first picture's caption is of no model
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(again, "_again", stopped)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "report",
            *(run.id for run in runs.values()),
            "--results",
            str(store.file),
            "--out",
            str(tmp_path / "page.html"),
            "--attention",
            "3",
            "--batch-size",
            "1",
        ],
    )
    with pytest.raises(SystemExit, match="130"):
        report.main()
    text = (tmp_path / "page.html").read_text()
    assert "was stopped: 1 captions have one" in text and text.count('type="text/plain"') == 1


def test_samples_are_drawn_again_as_they_were(tmp_path):
    store = Results(tmp_path / "results.sqlite")
    config = SETTINGS | {
        "max_new_tokens": 10,
        "decoder": {},
        "batch_size": 2,
        "search": {"do_sample": True, "num_beams": 1},
        "task": SETTINGS["task"] | {"start": 3, "count": 4},
    }
    entry = models.entry("scenes")
    run = store.open("[]", config | {"model": models.identity(entry)})
    speaker = generate.Speaker(*models.load(entry), entry.prompt, config["search"] | {"max_new_tokens": 10}, QUIET, 2)
    generate.describe(speaker, generate.plan({}), again.task(config).items(), store, run)
    page, _ = build.page(store, {"[]": run}, QUIET, maps=3)
    drawn = [shown.said[0].seen for shown in page.pictures]
    assert len({shown.said[0].row["caption"] for shown in page.pictures}) > 1 and [
        isinstance(seen, Seen) for seen in drawn
    ] == [True, True, True, False]


def test_the_batch_of_a_sample_is_drawn_as_it_was():
    runs = {
        label: type("Run", (), {"config": config})()
        for label, config in (("sampled", {"batch_size": 4}), ("greedy", {}))
    }
    jobs_ = again._in_turn(["sampled", "greedy"], runs, list("abcdefghij"), ["j", "b", "a"], 2)
    assert jobs_ == [
        ("sampled", ["i", "j"]),
        ("greedy", ["j", "b"]),
        ("sampled", ["a", "b", "c", "d"]),
        ("greedy", ["a"]),
    ]


# in a browser


def chromium():
    """The browser that CHROMIUM names, or one on the PATH."""
    return next(
        (
            found
            for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
            if name and (found := shutil.which(name))
        ),
        None,
    )


browser_wanted = pytest.mark.skipif(
    chromium() is None, reason="no chromium on the PATH; install one, or name it: CHROMIUM=FILE"
)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield found
        found.close()


@pytest.fixture
def opened(browser, made):
    """Opens the page; at the end nothing may have been asked of the network or said on the console."""
    asked, said, contexts = [], [], []

    def open_(width=1280, file=made[4], **options):
        contexts.append(
            context := browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce", **options)
        )
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == [] and sum(
        url.startswith("file:") for url in asked
    ) == len(contexts)
    assert said == []


def cells(page, article):
    """RGBA in the middle of every patch of the map drawn."""
    drawn = base64.b64decode(article.locator("canvas").evaluate("(one) => one.toDataURL()").partition(",")[2])
    return np.array(Image.open(io.BytesIO(drawn)).convert("RGBA"), int)[4::8, 4::8].reshape(196, 4)


def heat(level):
    """Colours of levels in [0, 1], as the page has them."""
    ramp = np.array([[60, 16, 20, 0], [217, 72, 15, 0.75], [255, 212, 59, 0.9], [255, 249, 219, 0.96]])
    place = np.minimum(level, 0.9999) * 3
    i = place.astype(int)
    return ramp[i] + (place - i)[:, None] * (ramp[i + 1] - ramp[i])


def facts(article, holds):
    article.page.wait_for_function(
        "([a, text]) => a.querySelector('.facts').textContent.includes(text)", arg=[article.element_handle(), holds]
    )
    return article.locator(".facts").inner_text()


@browser_wanted
def test_a_word_shows_where_the_model_looked(opened, made):
    """By keyboard: the map is the recorded one, of the mean and of a layer; pruned patches are grey; the timeline has
    the prunes and the word's place.
    """
    _, _, told, data, _ = made
    page = opened()
    number = next(i for i, shown in enumerate(data.pictures[:5]) if len(shown.said[1].row["prunes"]) >= 2)
    shown = data.pictures[number]
    said, record = shown.said[1], told["[prunehal]"][shown.id]
    article = page.locator(f"#i{number}")
    article.locator("h3").focus()
    page.keyboard.press("ArrowRight")  # the first word of the first caption
    facts(article, "[], ")
    page.keyboard.press("ArrowDown")  # of the second
    facts(article, "[prunehal], ")
    prunes = [prune["step"] for prune in said.row["prunes"]]
    for _ in range(60):
        token = int(page.evaluate("document.activeElement.dataset.t"))
        if token + 1 >= prunes[-1]:
            break
        page.keyboard.press("ArrowRight")
    assert token + 1 >= prunes[-1] > prunes[0]
    facts(article, f"step {token + 1} of")
    assert f"{said.row['prunes'][-1]['kept']} of 196 patches left" in facts(article, "left.")
    weights, left = record["maps"][token].float().numpy(), record["left"][token].float().numpy()

    def check(expected, share):
        """Heat over grey, as much of it as layers have dropped the patch."""
        drawn, level = cells(page, article), heat(expected / expected.max())[:, 3] * (expected > 0)
        grey = 0.66 * (1 - share)
        assert (
            np.abs(drawn[:, 3] / 255 - (level + grey * (1 - level))).max() < 0.03
            and drawn[expected.argmax(), 3] > 0.94 * 255
        )
        gone = share < 0.001
        assert gone.sum() > 20 and (drawn[gone, :3] == 128).all()
        return drawn

    mean = check(weights.mean(0), left.mean(0))
    page.keyboard.press("]")
    facts(article, "layer 1 of 8")
    first = check(weights[0], left[0])
    assert (left[0] != left.mean(0)).any() and (mean != first).any()
    page.keyboard.press("ArrowLeft")
    facts(article, f"step {int(page.evaluate('document.activeElement.dataset.t')) + 1} of")
    assert (cells(page, article) != first).any()
    section = article.locator(".stack").nth(1)
    assert [
        int(step) for step in section.locator("line.prune").evaluate_all("(all) => all.map((one) => one.dataset.step)")
    ] == prunes
    assert (
        section.locator("circle.now").get_attribute("visibility") == "visible"
        and article.locator(".stack").nth(0).locator("circle.now").get_attribute("visibility") == "hidden"
    )
    assert (
        section.locator("[data-t][tabindex='0']").count() == 1 and section.locator("[aria-pressed='true']").count() == 1
    )
    bounds = [section.locator(f"line.{kind}").first.bounding_box()["x"] for kind in ("prune", "now")]
    assert bounds[0] < bounds[1]
    back = page.locator("#i5 .stack").nth(1)
    back.scroll_into_view_if_needed()
    assert (
        back.locator("line.back").get_attribute("data-step") == "10"
        and "1 rollback at step 10 to 6" in back.locator(".time p").inner_text()
    )
    page.mouse.move(0, 0)
    article.locator("[data-t]").first.hover()
    facts(article, "[], ")


@browser_wanted
def test_one_layer_is_chosen_for_all_pictures(opened):
    page = opened()
    one, two = page.locator("#i0"), page.locator("#i1")
    for article in (two, one):
        article.locator("[data-t]").first.hover()
        facts(article, "mean of 8 layers")
    mean = cells(page, two)
    page.keyboard.press("]")
    for article in (one, two):
        facts(article, "layer 1 of 8")
        assert (
            article.locator(".control output").inner_text() == "layer 1 of 8"
            and article.locator(".control input").input_value() == "1"
        )
    assert (cells(page, two) != mean).any()


@browser_wanted
def test_escape_leaves_the_search(opened):
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("zzzz")
    assert page.locator("#count").inner_text().startswith("0 of")
    page.keyboard.press("Escape")
    assert not page.locator("#count").inner_text().startswith("0 of") and page.locator("#find").input_value() == ""
    page.keyboard.press("j")
    assert page.locator("#find").input_value() == "" and page.evaluate("document.activeElement.tagName") == "H3"


@browser_wanted
def test_hallucinated_words_are_red_and_marked_without_colour(opened, made):
    page = opened()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        mark = page.locator("article mark.false").first
        red, green, blue = map(int, re.findall(r"\d+", mark.evaluate("(one) => getComputedStyle(one).color"))[:3])
        assert red > 1.4 * max(green, blue)
        assert (
            mark.evaluate("(one) => getComputedStyle(one).textDecorationStyle") == "wavy"
            and mark.locator(".vh").text_content().strip() == "(hallucinated)"
        )
        assert mark.get_attribute("title").startswith("hallucinated")
    known = [said for shown in made[3].pictures for said in shown.said]
    assert (
        page.locator("article mark.false").count()
        == sum(m["object"] in said.row["hallucinated"] for said in known for m in said.row["mentions"])
        > 0
    )
    assert page.locator("article mark.true").count() > 5
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert sum(map(int, re.findall(r"\d+", paper))) < 150 and sum(map(int, re.findall(r"\d+", ink))) > 600


@browser_wanted
def test_tables_and_plots_are_shown(opened, made):
    page = opened()
    table = page.locator("#numbers table")
    assert table.locator("thead th").all_inner_texts() == ["[]", "[prunehal]", "[prunehal] - []"]
    row = table.locator("tr", has_text="CHAIR_I %, per mention").inner_text()
    metric = generate.measure(
        again.task(SETTINGS),
        {
            said: list(rows.values())
            for said, rows in build.together(made[0], build.labelled(list(made[1].values()))).items()
        },
    )
    assert (
        f"{metric['[]']['chair_i']['value']:.1f} [" in row
        and f"{metric['[prunehal]']['difference']['chair_i']['value']:+.1f} [" in row
    )
    assert (
        made[1]["[prunehal]"].id in page.locator("#run").inner_text() and "torch" in page.locator("#run").inner_text()
    )
    assert page.locator(".plots img").count() == 2
    assert page.locator(".plots img").evaluate_all(
        "(all) => all.every((one) => one.complete && one.naturalWidth > 300 && one.alt.length > 40)"
    )


@browser_wanted
def test_pictures_are_found_chosen_and_ordered(opened, made):
    page, pictures = opened(), made[3].pictures
    visible = lambda: page.locator("article:not([hidden]) h3").all_text_contents()  # noqa: E731
    ids = [shown.id for shown in pictures]
    assert visible() == ids
    page.keyboard.press("/")
    page.keyboard.type(ids[2])
    assert visible() == [ids[2]] and page.locator("#count").inner_text() == "1 of 6 pictures"
    name = pictures[0].objects[0]
    page.fill("#find", name)
    assert visible() == [shown.id for shown in pictures if name in shown.find] != ids
    page.fill("#find", "")
    gaps = {shown.id: shown.gaps[0] for shown in pictures}
    assert gaps[ids[5]] == 1
    for kind, fits in (("worse 0", lambda gap: gap > 0), ("better 0", lambda gap: gap < 0)):
        page.select_option("#only", kind)
        assert visible() == [i for i in ids if fits(gaps[i])]
    page.select_option("#only", "all")
    for order, sign in (("best 0", 1), ("worst 0", -1)):
        page.select_option("#order", order)
        assert visible() == sorted(ids, key=lambda i: sign * gaps[i])
    assert visible() != ids
    page.select_option("#order", "run")
    page.locator("#pictures-title").click()
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('article').id") == "i1"
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.closest('article').id") == "i0"


@browser_wanted
def test_what_models_say_is_text(opened, made):
    page = opened()
    caption = page.locator("#i5 .caption").nth(1)
    text = caption.evaluate("(one) => one.textContent")
    assert text.replace(" (hallucinated)", "") == HOSTILE and page.locator("article img[src=x]").count() == 0
    assert page.title() == "[] · [prunehal] on " + made[3].title and "owned" not in page.title()
    raw = made[4].read_text()
    assert "</script><img" not in raw and html.escape("</script><img src=x", quote=False) in raw
    said = Said(
        "[x]",
        {
            "caption": HOSTILE,
            "objects": None,
            "hallucinated": None,
            "mentions": [],
            "prunes": [{"step": 2, "kept": HOSTILE}],
            "rollbacks": [],
            "tokens": 3,
            "question": HOSTILE,
        },
    )
    other = made[3].__class__(
        **vars(made[3]) | {"pictures": [Shown(HOSTILE, [said])], "labels": [HOSTILE], "title": HOSTILE}
    )
    (file := made[4].parent / "hostile.html").write_text(written(other), encoding="utf-8")
    assert opened(file=file).locator("img[src=x]").count() == 0
    assert (
        json.loads(re.search(r'<script type="application/json">(.*?)</script>', file.read_text())[1])[0]["prunes"][0][
            "kept"
        ]
        == HOSTILE
    )
    assert "\u2028" not in re.search(r'<script type="application/json">(.*?)</script>', file.read_text())[1]


@browser_wanted
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_is_accessible(opened, width):
    page = opened(width)
    page.locator("#i0 [data-t]").nth(3).click()
    facts(page.locator("#i0"), "step ")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe-playwright-python is not installed: pip install -e '.[test]'",
    ).Axe()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page).response["violations"]
        assert found == [], [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found]
