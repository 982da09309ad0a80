"""run.py as people use it: the main job in small, resuming, own images, and every bad input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from experiments.cli import arguments
from experiments.inputs.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, folder):
    """A process of its own. Most tests here take `run_here`, which starts none."""
    words = [*arguments, f"hydra.run.dir={folder}", f"results={folder}/results.sqlite"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "run.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_main_job_in_small_and_resume(tmp_path, run_here):
    done = run("task.count=6", "batch_size=3", "max_new_tokens=60", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CHAIR_S" in done.stdout and "tokens/s" in done.stdout and "[prunehal] - []" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {r["stack"] for r in rows} == {"[]", "[prunehal]"}
    assert {"image", "stack", "caption", "tokens", "objects", "hallucinated", "mentions", "prunes"} <= rows[0].keys()
    assert [r["image"] for r in rows] == sorted({r["image"] for r in rows}) * 2  # whatever the order of the batches
    assert all(r["prunes"] for r in rows if r["stack"] == "[prunehal]")
    assert all(r["caption"][m["start"] : m["end"]] == m["words"] for r in rows for m in r["mentions"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("chair_s", "chair_i", "chair_i_unique", "recall", "f1", "words", "mentions"):
        assert (
            {"value", "low", "high"}
            == metrics["[prunehal]"][name].keys()
            == metrics["[prunehal]"]["difference"][name].keys() - {"p"}
        )
    assert (tmp_path / "attention.png").stat().st_size > 5000
    assert "r: 0.9" in (tmp_path / "config.yaml").read_text()  # of the model
    # lose the end: the rest is kept, and only what is lost is done again
    lost = [r["image"] for r in rows[8:]]
    with closing(sqlite3.connect(tmp_path / "results.sqlite")) as base, base:
        gone = "DELETE FROM answers WHERE rowid > 6 AND item IN (?, ?, ?, ?)"  # of the second stack
        assert base.execute(gone, lost).rowcount == 4
    again = run_here("task.count=6", "batch_size=3", "max_new_tokens=60", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 of 6 answers are in the store" in again.stdout
    after = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert (
        after[:8] == rows[:8]
        and [a["caption"] for a in after] == [r["caption"] for r in rows]
        and [a["image"] for a in after[8:]] == lost
    )
    # captions of one setting are not taken for another's
    other = run_here("task.count=6", "batch_size=3", "max_new_tokens=60", "decoder.prunehal.r=0.2", folder=tmp_path)
    assert other.returncode == 2 and "other settings (decoder)" in " ".join(other.stderr.split())


def answers(store):
    if not store.exists():
        return 0
    with closing(sqlite3.connect(store)) as base:
        return (
            base.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
            if base.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone()
            else 0
        )


def heard():
    """Ctrl-C is ignored by what was started in the background of a script, and so by its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_interrupt_keeps_what_is_done(tmp_path, run_here):
    """In a fork of this process, which has imported everything."""
    if not (process := os.fork()):
        code = 70
        try:
            heard()
            done = run_here("task.count=200", "batch_size=1", folder=tmp_path)
            (tmp_path / "said").write_text(done.stdout)
            code = done.returncode
        finally:
            os._exit(code)
    until = time.time() + 300
    while time.time() < until and answers(tmp_path / "results.sqlite") < 3:
        time.sleep(0.1)
    os.kill(process, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    kept = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(kept) == answers(tmp_path / "results.sqlite")
    out = (tmp_path / "said").read_text()
    assert 3 <= len(kept) < 200 and "are kept" in out and "hydra.run.dir" in out


def test_own_images(tmp_path, run_here):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGBA", (40, 30), (200, 10, 10, 128)).save(pictures / "alpha.png")
    Image.new("CMYK", (64, 64)).save(pictures / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(pictures / "dot.png")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8nonsense")
    done = run_here(f"image={pictures}", "max_new_tokens=8", folder=tmp_path / "out")
    assert done.returncode == 1
    assert "skipped broken.jpg" in done.stdout and "1 of 4 images could not be read" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert {r["image"] for r in rows} == {"alpha.png", "cmyk.jpg", "dot.png"} and rows[0]["objects"] is None


def test_multirun_over_stacks(tmp_path, run_here):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (30, 30)).save(pictures / "a.png")
    (pictures / "broken.png").write_text("no image")  # the first job ends in an error, the second runs all the same
    done = run_here(
        "-m",
        "decoder=[],[prunehal]",
        "compare=false",
        f"image={pictures}",
        "max_new_tokens=8",
        f"hydra.sweep.dir={tmp_path}",
        f"results={tmp_path}/results.sqlite",
    )
    assert done.returncode == 1 and done.stdout.count("1 of 2 images could not be read") == 2
    stacks = [
        {json.loads(line)["stack"] for line in (tmp_path / job / "captions.jsonl").read_text().splitlines()}
        for job in "01"
    ]
    assert stacks == [{"[]"}, {"[prunehal]"}]
    assert "2 runs of the sweep" in done.stdout
    assert [line.split(",")[0] for line in (tmp_path / "sweep.csv").read_text().splitlines()] == ["job", "#0", "#1"]


@pytest.mark.parametrize(
    "stack, search",
    [
        ("opera,prunehal", "beam"),
        ("opera,vcd,dola,prunehal", "greedy"),
        ("random_pruner,truncation", "beam"),
        pytest.param("vcd,prunehal", "greedy", marks=pytest.mark.slow),
        pytest.param("dola,prunehal", "sampling", marks=pytest.mark.slow),
        pytest.param("deco,prunehal", "beam_sampling", marks=pytest.mark.slow),
        pytest.param("plausibility", "greedy", marks=pytest.mark.slow),
    ],
)
def test_stacks_and_searches(tmp_path, run_here, stack, search):
    done = run_here(f"decoder=[{stack}]", f"search={search}", "task.count=2", "max_new_tokens=24", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"[{stack}] - []" in done.stdout and "CHAIR_S" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(r["caption"] for r in rows)
    if "prune" in stack:
        assert all(r["prunes"] for r in rows if r["stack"] != "[]")


@pytest.mark.slow
def test_compiled_steps_caption_the_same_and_say_how_long_compiling_took(tmp_path):
    rows = []
    for compile in ("off", "on"):
        folder = tmp_path / compile
        done = run("task.count=2", "max_new_tokens=24", f"compile={compile}", folder=folder)
        assert done.returncode == 0, done.stderr
        assert ("compiled a step of" in done.stdout) == (compile == "on")
        rows.append([json.loads(line)["caption"] for line in (folder / "captions.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1] and all(rows[0])


def test_multirun_over_stacks_under_beams(tmp_path, run_here):
    done = run_here(
        "-m",
        "decoder=[opera,prunehal],[vcd,prunehal]",
        "search=beam",
        "compare=false",
        "task.count=1",
        "max_new_tokens=8",
        f"hydra.sweep.dir={tmp_path}",
        f"results={tmp_path}/results.sqlite",
    )
    assert done.returncode == 0, done.stderr
    stacks = [
        {json.loads(line)["stack"] for line in (tmp_path / job / "captions.jsonl").read_text().splitlines()}
        for job in "01"
    ]
    assert stacks == [{"[opera,prunehal]"}, {"[vcd,prunehal]"}]


def test_a_foreign_decoder_joins_with_its_class_and_its_yaml(tmp_path, run_here, monkeypatch):
    """Nothing but a class on the Python path and a yaml in a folder of the user's own."""
    (tmp_path / "conf/decoder").mkdir(parents=True)
    (tmp_path / "conf/decoder/shout.yaml").write_text("shout:\n  _target_: shouting.Shout\n  token: 9\n")
    (tmp_path / "shouting.py").write_text(
        "from dataclasses import dataclass\nfrom decoders import Decoder\n\n@dataclass\nclass Shout(Decoder):\n   "
        " token: int = 5\n\n    def process_logits(self, step, state, scores):\n        return scores.index_fill(1,"
        " scores.new_tensor([self.token]).long(), 1e4)\n"
    )
    words = [
        f"--config-dir={tmp_path / 'conf'}",
        "decoder=[shout,prunehal]",
        "decoder.shout.token=11",
        "search=beam",
        "task.count=1",
        "max_new_tokens=4",
    ]
    monkeypatch.syspath_prepend(tmp_path)
    done = run_here(*words, folder=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "[shout,prunehal] - []" in done.stdout
    with pytest.raises(InputError, match="Did you mean 'shout'"):
        arguments.check([f"--config-dir={tmp_path / 'conf'}", "decoder=[shot]"])
    with pytest.raises(InputError, match="no folder"):
        arguments.check(["--config-dir", "/no/such/folder", "decoder=[prunehal]"])


@pytest.mark.parametrize(
    "argument, words",
    [
        ("decoder=[prunhal]", "Did you mean 'prunehal'? Valid: avisc, deco, dola"),
        ("decoder=[prunehal,vcd,prunehal]", "names prunehal twice; name it once"),
        ("decoder=[vcd],[prunehal,prunehal]", "names prunehal twice; name it once"),
        ("decoder=prunehall", "Did you mean 'prunehal'"),
        ("model=scene", "Did you mean 'scenes'? Valid: auto, aya_vision_8b"),
        ("decoder.prunehal.rr=0.2", "Did you mean 'decoder.prunehal.r'"),
        ("decoder.vcd.alpha=1", "of vcd, which is not in decoder=[prunehal]. Add it: 'decoder=[prunehal,vcd]'"),
        ("decoder.vdc.alpha=1", "decoder.vdc.alpha: Unknown decoder 'vdc'. Did you mean 'vcd'?"),
        ("logger.wandb.project=x", "of wandb, which is not in logger=[]. Add it: 'logger=[wandb]'"),
        ("model=lava15_7b", "Did you mean 'llava15_7b'"),
        ("model.pth=x", "Did you mean 'model.path'"),
        ("model.settings.prunehal.timing=after", "add it with a plus: '+model.settings.prunehal.timing=VALUE'"),
        ("imge=x", "Did you mean 'image'"),
        ("hydra.run.dir=/dev/null/x", "cannot write"),
        ("decoder=[prunehal", "Quote lists"),
        ("experiment.places=[a]", "choose one: experiment=NAME"),
        ("hydra/launcher=processes", "is for many runs; add -m"),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials cannot be 0"),
    ],
)
def test_bad_words_name_the_nearest(argument, words):
    with pytest.raises(InputError) as error:
        arguments.check([argument])
    assert words in str(error.value)


def test_flags_may_stand_anywhere():
    assert arguments.ordered(["a=1", "-m", "--config-dir", "x", "b=2", "--config-dir=y"]) == [
        "-m",
        "--config-dir",
        "x",
        "--config-dir=y",
        "a=1",
        "b=2",
    ]


def test_good_words_pass():
    arguments.check(
        [
            "decoder=[]",
            "decoder=[prunehal]",
            "decoder.prunehal.r=0.2",
            "model=llava15_7b",
            "image=x.png",
            "-m",
            "search=greedy,sampling",
        ]
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["decoder=[prunhal]"], "Did you mean 'prunehal'"),
        (["decoder.prunehal.r=1.5"], "in (0, 1]"),
        (["decoder.prunehal.t=-1"], "integer >= 0"),
        (["batch_size=0"], "integer >= 1"),
        (["compile=onn"], "Unknown compile 'onn'. Did you mean 'on'"),
        (["task.count=many"], "task.count is an integer >= 1, not 'many'"),
        (["dry_run=flase"], "dry_run is true or false"),
        (["decoder=[vcd]", "decoder.vcd.alpha=-1"], "alpha is a number"),
        (["decoder=[opera]", "decoder.opera.faithful=true", "task.count=1"], "at least 2 beams"),
        (["model=llava15_7b"], "Offline"),
        (["image=/no/such/place"], "no such image"),
        (["model.attn_implementation=flex_attention"], "cannot be read with attn_implementation='flex_attention'"),
        (["image=EMPTY"], "is empty"),
        (["model.prompt=", "search=beem"], "Valid: beam, beam_sampling, greedy, sampling"),
    ],
)
def test_bad_input_ends_in_one_clear_screen(tmp_path, arguments, words, run_here):
    """In this process; `test_bad_input_ends_a_process` starts one."""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_here(*(a.replace("EMPTY", str(empty)) for a in arguments), folder=tmp_path / "out")
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12


def test_bad_input_ends_a_process(tmp_path):
    done = run("decoder=[prunhal]", folder=tmp_path / "out")
    assert done.returncode == 2
    assert "Did you mean 'prunehal'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12
