"""Under lmms-eval: a task of ours in its format, through its registry, evaluator and command line; against run.py's
captions; every error.
"""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

evaluator = pytest.importorskip(
    "lmms_eval.evaluator",
    reason="lmms-eval is not installed, or not what it needs; docs/lmms-eval.md says what to install",
    exc_type=ImportError,
)

import lmms_eval.models
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager

from decoders import Decoder, Stack, StackError
from experiments import models
from experiments.inputs.errors import InputError
from experiments.integrations.lmms_eval import adapter
from experiments.runner import generate
from experiments.scenes.language import CAPTION_PROMPT
from experiments.tasks import Scenes

ROOT = Path(__file__).resolve().parents[2]
NEW = 14
ASKED = [
    CAPTION_PROMPT,
    "Is there a dog?",
    "What is at the top left of the picture?",
    CAPTION_PROMPT,
    "Is there a cat in the image?",
    "Where?",
]
UTILS = """
import numpy
from PIL import Image
from experiments.metrics import chair

def visual(doc):
    return [Image.open(doc["file"])]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"chair_i": chair.counts([chair.score(results[0], doc["objects"])])[0].tolist()}

def total(rows):
    return float(chair.rates(numpy.array(rows).sum(0))["chair_i"])
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: id
process_results: !function utils.score
metric_list: [{{metric: chair_i, aggregation: !function utils.total, higher_is_better: false}}]
generation_kwargs:
  {{max_new_tokens: {new}, temperature: 0, do_sample: false, num_beams: 1, image_aspect_ratio: original}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures of scenes, two tasks about them, and what pip would leave of this package's entry
    points.
    """
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "pictures").mkdir()
    (folder / "tasks").mkdir()
    (folder / "tasks/utils.py").write_text(UTILS)
    rows = []
    for item in Scenes("validation", "typical", 0, len(ASKED)).items():
        file = folder / f"pictures/{item.id.replace('/', '-')}.png"
        item.open().save(file)
        rows.append({"id": item.id, "file": str(file), "objects": item.objects})
    for name, questions in (("scenes_chair", [CAPTION_PROMPT] * len(ASKED)), ("scenes_questions", ASKED)):
        (folder / f"tasks/{name}.jsonl").write_text(
            "".join(
                json.dumps(row | {"question": question}) + "\n" for row, question in zip(rows, questions, strict=False)
            )
        )
        (folder / f"tasks/{name}.yaml").write_text(TASK.format(name=name, file=folder / f"tasks/{name}.jsonl", new=NEW))
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = folder / "site/prunehal-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prunehal\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    return folder


@pytest.fixture
def evaluate(place, monkeypatch):
    """`evaluate(model_args, ...)` through lmms-eval's registry and evaluator: the answers in the order of documents,
    and the results.
    """
    monkeypatch.syspath_prepend(place / "site")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    lmms_eval.models.MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)

    def run(arguments, task="scenes_chair", model="prunehal", **more):
        manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
        results = evaluator.simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **more
        )
        return [
            row["filtered_resps"][0] for row in sorted(results["samples"][task], key=lambda row: row["doc_id"])
        ], results

    return run


@pytest.fixture(scope="module")
def said(place):
    """What run.py says of the pictures, by stack, in the order of documents."""
    words = [
        f"image={place / 'pictures'}",
        f"max_new_tokens={NEW}",
        "decoder=[opera,prunehal]",
        "decoder.prunehal.r=0.5",
        "search=beam",
        f"hydra.run.dir={place / 'run'}",
        f"results={place / 'run.sqlite'}",
    ]
    done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    out = {}
    for row in map(json.loads, (place / "run/captions.jsonl").read_text().splitlines()):
        out.setdefault(row["stack"], {})[row["image"]] = row["caption"]
    assert len(set(out["[]"].values())) > 3 and out["[]"] != out["[opera,prunehal]"]
    return {stack: [rows[name] for name in sorted(rows)] for stack, rows in out.items()}


@pytest.fixture(scope="module")
def model():
    """An adapter with the empty stack; tests may change its batch size and stack."""
    return adapter.Simple(3, decoder="[]")


def requests(model, texts, visuals, kwargs=None, task="mine"):
    """Requests as a simple task makes them, one a text."""
    model.task_dict[task] = {"test": [{"visuals": found} for found in visuals]}
    asked = {"max_new_tokens": 8} if kwargs is None else kwargs
    return [
        Instance(
            "generate_until",
            (text, dict(asked), lambda doc: doc["visuals"], n, task, "test"),
            0,
            {"task": task, "doc_id": n, "repeats": 1},
        )
        for n, text in enumerate(texts)
    ]


def answers(model, *args, **more):
    return [answer.text for answer in model.generate_until(requests(model, *args, **more))]


def pictures(count, start=0):
    return [item.open() for item in Scenes("validation", "typical", start, count).items()]


@pytest.mark.parametrize(
    "stack, batch, simple",
    [("[]", 1, False), ("[]", 3, True), ("[opera,prunehal]", 1, True), ("[opera,prunehal]", 3, False)],
)
def test_answers_are_those_of_run_py(evaluate, said, stack, batch, simple):
    options = ",decoder.prunehal.r=0.5" if "prunehal" in stack else ""
    found, results = evaluate(f"decoder={stack},search=beam{options}", batch_size=batch, force_simple=simple)
    assert found == said[stack]
    assert lmms_eval.models.get_model("prunehal", force_simple=simple) is (adapter.Simple if simple else adapter.Chat)
    assert 0 <= results["results"]["scenes_chair"]["chair_i,none"] <= 100
    assert all(row["token_counts"][0]["output_tokens"] <= NEW for row in results["samples"]["scenes_chair"])


def command(place, *words, launch=()):
    """`python -m lmms_eval` on the task, from another folder."""
    path = os.pathsep.join([str(ROOT), str(place / "site"), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_DATASETS_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    fixed = ["--model", "prunehal", "--tasks", "scenes_chair", "--include_path", str(place / "tasks"), "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "lmms_eval", *fixed, *words],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if (
        "No such file" in done.stderr + done.stdout
        and f"{Path(lmms_eval.__file__).parent}/tasks/" in done.stderr + done.stdout
    ):
        pytest.skip(
            "this wheel of lmms-eval (0.7.1) lacks files that its own tasks include: its command ends in an error,"
            " whatever the model"
        )
    return done


def samples(folder):
    (file,) = folder.rglob("*_samples_scenes_chair.jsonl")
    return {
        row["doc_id"]: row["filtered_resps"]
        for row in map(json.loads, file.read_text().splitlines())
        if row["filtered_resps"]
    }


def test_the_command_line(place):
    weights = ROOT / "experiments/scenes/model"
    done = command(
        place,
        "--batch_size",
        "4",
        "--limit",
        "5",
        "--output_path",
        "out",
        "--model_args",
        f"pretrained={weights},dtype=float32,device=cpu,decoder=[prunehal]",
    )
    assert done.returncode == 0, done.stderr
    (file,) = place.glob("out/*/*_results.json")
    assert (
        0 <= json.loads(file.read_text())["results"]["scenes_chair"]["chair_i,none"] <= 100
        and "scenes_chair" in done.stdout
    )
    assert sorted(samples(place / "out")) == list(range(5))
    wrong = command(place, "--verbosity", "DEBUG", "--output_path", "none", "--model_args", "decoder=[prunehl]")
    assert wrong.returncode == 1 and "Did you mean 'prunehal'" in wrong.stderr
    assert not (place / "outputs").exists()


@pytest.mark.slow
def test_two_processes_share_the_documents(place):
    for processes, launch in ((1, ()), (2, ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"))):
        done = command(
            place,
            "--batch_size",
            "2",
            "--limit",
            "5",
            "--verbosity",
            "DEBUG",
            "--output_path",
            f"by{processes}",
            "--model_args",
            "decoder=[prunehal]",
            launch=launch,
        )
        if "ProcessGroupGloo::allgather" in done.stderr:
            pytest.skip("lmms-eval 0.7.1 cannot gather the number of requests from processes without a GPU")
        assert done.returncode == 0, done.stderr
    assert samples(place / "by2") == samples(place / "by1") and sorted(samples(place / "by1")) == list(range(5))


def test_prompts_of_unequal_length_and_the_order_of_answers(evaluate):
    alone, _ = evaluate("decoder=[prunehal]", "scenes_questions", batch_size=1)
    assert len(set(alone)) >= 4 and alone[1].lower().startswith(("yes", "no"))
    assert evaluate("decoder=[prunehal]", "scenes_questions", batch_size=4)[0] == alone


def test_generation_arguments_that_differ_are_batched_apart(model):
    asked = requests(model, [CAPTION_PROMPT] * 3, [[p] for p in pictures(3)])
    asked[1].args[1]["max_new_tokens"] = 3
    asked[2].args[1]["num_beams"] = 2
    kept = [dict(request.args[1]) for request in asked]
    together = [(answer.text, answer.token_counts.output_tokens) for answer in model.generate_until(asked)]
    assert [count for _, count in together] == [8, 3, 8]
    assert together == [
        (one.text, one.token_counts.output_tokens) for request in asked for one in model.generate_until([request])
    ]
    assert [request.args[1] for request in asked] == kept


@pytest.mark.parametrize("until", [".", [".", " top"], ["\n\n", "", "."]])
def test_stop_strings(model, until):
    """Answers end before the first of them, and nothing is generated after it; a blank line, which lmms-eval puts in
    for none, ends nothing.
    """
    visuals = [[p] for p in pictures(3)]
    whole = answers(model, [CAPTION_PROMPT] * 3, visuals, {"max_new_tokens": 40})
    cut = model.generate_until(requests(model, [CAPTION_PROMPT] * 3, visuals, {"max_new_tokens": 40, "until": until}))
    ends = [end for end in ([until] if isinstance(until, str) else until) if end.strip()]
    places = [min(text.find(end) % 1000 for end in ends) for text in whole]
    assert min(places) < 999
    assert [answer.text for answer in cut] == [text[:at].strip() for text, at in zip(whole, places, strict=False)]
    alone = model.generate_until(requests(model, [CAPTION_PROMPT], visuals[:1], {"max_new_tokens": 40, "until": until}))
    assert alone[0].token_counts.output_tokens < 40


@dataclass
class Breaking(Decoder):
    """Fails at the third token."""

    def process_logits(self, step, state, scores):
        if step.max_num_forwards == 3:
            raise RuntimeError("broken on purpose")
        return scores


def test_what_fails_in_a_generation_reaches_the_caller(evaluate, model, monkeypatch):
    monkeypatch.setattr(model, "plan", generate.Plan("[breaking]", Stack([Breaking()])))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        evaluate("", model=model)


GREEDY, BEAM = (
    {"do_sample": False, "num_beams": 1},
    {
        "do_sample": False,
        "num_beams": 5,
        "length_penalty": 1.0,
        "early_stopping": False,
    },
)
SAMPLING = {"do_sample": True, "num_beams": 1, "top_p": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    "typed, asked, expected, ignored",
    [
        ({}, {}, GREEDY | {"max_new_tokens": 256}, []),
        (
            {},
            {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "n": 1},
            GREEDY | {"max_new_tokens": 9},
            [],
        ),
        ({}, {"temperature": 0, "do_sample": True, "top_p": None}, GREEDY | {"max_new_tokens": 256}, []),
        (
            {},
            {"temperature": 0.2, "top_p": 0.9},
            SAMPLING | {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 256},
            [],
        ),
        ({}, {"temperature": 0.2, "do_sample": False, "top_p": 0.9}, GREEDY | {"max_new_tokens": 256}, []),
        ({}, {"do_sample": True}, SAMPLING | {"temperature": 1.0, "max_new_tokens": 256}, []),
        (
            {},
            {"num_beams": 3, "repetition_penalty": 1.1, "image_aspect_ratio": "pad"},
            GREEDY | {"num_beams": 3, "repetition_penalty": 1.1, "max_new_tokens": 256},
            ["image_aspect_ratio=pad"],
        ),
        (
            {"search": "beam", "max_new_tokens": 7},
            {"max_new_tokens": 9, "num_beams": 1, "temperature": 0},
            BEAM | {"max_new_tokens": 7},
            ["max_new_tokens=9", "num_beams=1"],
        ),
        (
            {"search.num_beams": 2},
            {"num_beams": 1, "do_sample": False},
            GREEDY | {"num_beams": 2, "max_new_tokens": 256},
            ["num_beams=1"],
        ),
    ],
)
def test_a_tasks_generation_arguments(typed, asked, expected, ignored):
    generate, ends, unused = adapter.options(adapter.compose(typed), typed, asked)
    assert (generate, ends, unused) == (expected, [], ignored)


def test_several_answers_a_request_are_refused():
    with pytest.raises(InputError, match="num_return_sequences: a request has one answer"):
        adapter.options(adapter.compose({}), [], {"num_return_sequences": 2})


def test_options_are_those_of_run_py(tmp_path):
    cfg = adapter.compose(
        {
            "pretrained": "it's/here, {now}",
            "decoder": "[vcd,prunehal]",
            "decoder.prunehal.r": 0.9,
            "decoder.vcd.alpha": 0.001,
            "dtype": "float32",
            "trust_remote_code": False,
            "adapter": None,
            "search": "beam",
        }
    )
    assert (cfg.model.path, cfg.model.dtype, cfg.model.trust_remote_code, cfg.model.adapter) == (
        "it's/here, {now}",
        "float32",
        False,
        None,
    )
    assert (list(cfg.decoder), cfg.decoder.prunehal.r, cfg.decoder.vcd.alpha, cfg.search.num_beams) == (
        ["vcd", "prunehal"],
        0.9,
        0.001,
        5,
    )
    assert (
        adapter.compose({"pretrained": "/a", "model": "llava15_7b", "decoder": ["prunehal"]}).decoder.prunehal.r == 0.4
    )
    assert adapter.compose({}).model == models.entry("scenes")
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/own.yaml").write_text("own: {_target_: baselines.Truncation}")
    assert list(adapter.compose({"config_dir": str(tmp_path), "decoder": "[own]"}).decoder) == ["own"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"decoder": "[prunehl]"}, "Did you mean 'prunehal'"),
        ({"decoder.prunehal.ratio": 1}, "option 'decoder.prunehal.ratio'"),
        ({"decodr": "[]"}, "Did you mean 'decoder'"),
        ({"model": "lava15_7b"}, "Did you mean 'llava15_7b'"),
        ({"dtpe": "float32"}, "Did you mean 'dtype'"),
        ({"dtype": "auto"}, "Unknown model.dtype 'auto'"),
        ({"search": "beams"}, "Did you mean 'beam'"),
        ({"task": "coco"}, "--tasks"),
        ({"pretrained": "./nothing"}, "there is no folder './nothing'"),
        ({"max_new_tokens": 0}, "max_new_tokens is an integer >= 1"),
        ({"batch_size": "auto"}, "batch_size is an integer >= 1, not 'auto'"),
        ({"config_dir": "nowhere"}, "'nowhere', which is no folder"),
        ({"search": "beam", "search.num_beams": "${oops}"}, "oops"),
    ],
)
def test_errors_of_model_args(arguments, words):
    with pytest.raises(InputError) as error:
        adapter.Simple(**arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text, visuals, words",
    [
        ("a", ["film.mp4"], "document 0 of mine holds a visual of the kind video"),
        ("a", [{"array": [0.0], "sampling_rate": 1}], "kind dict"),
        ("a", ["gone.png"], "document 0 of mine: no readable image"),
        ("<image> or <image>?", [None], "2 times <image> in its text, and 1 pictures"),
    ],
)
def test_visuals_that_cannot_be_shown(model, text, visuals, words):
    with pytest.raises(InputError, match=words):
        answers(model, [text], [[pictures(1)[0] if one is None else one for one in visuals]])


def test_files_are_pictures_too(model, place):
    file = min((place / "pictures").iterdir())
    assert answers(model, [CAPTION_PROMPT], [[str(file)]]) == answers(model, [CAPTION_PROMPT], [pictures(1)])


def test_pictures_stand_where_the_text_has_them(model):
    one, two = pictures(2)
    image = {"type": "image"}
    made = adapter.messages(model._messages(requests(model, ["A <image>, B <image>?"], [[one, two]])[0]), "here")
    assert made[0] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "A "},
                image,
                {"type": "text", "text": ", B "},
                image,
                {"type": "text", "text": "?"},
            ],
        }
    ]
    assert [p.tobytes() for p in made[1]] == [one.tobytes(), two.tobytes()]
    assert adapter.messages(model._messages(requests(model, ["A"], [[one, two]])[0]), "here")[0][0]["content"] == [
        image,
        image,
        {"type": "text", "text": "A"},
    ]
    together = answers(model, ["<image> or <image>?", CAPTION_PROMPT, "What is it?"], [[one, two], [one], [two]])
    assert together == [
        text
        for n, (question, seen) in enumerate(
            zip(["<image> or <image>?", CAPTION_PROMPT, "What is it?"], [[one, two], [one], [two]], strict=False)
        )
        for text in answers(model, [question], [seen])
    ]


def test_requests_without_a_picture(model, monkeypatch):
    """Plain text where the stack can, beside those that have one; else an error that names the decoder."""
    seen = [[], pictures(1), None]
    together = answers(model, ["Is there a dog?", CAPTION_PROMPT, "Hello there."], seen)
    assert all(together) and together[1] == answers(model, [CAPTION_PROMPT], [pictures(1)])[0]
    monkeypatch.setattr(model, "plan", adapter.Simple(decoder="[prunehal]").plan)
    with pytest.raises(StackError, match="prunehal: no prompt holds visual tokens"):
        answers(model, ["Is there a dog?"], [[]])


def test_chats(model):
    """Turns and pictures in their order; one turn only for a template."""
    chat = adapter.Chat(decoder="[]")
    one, two = pictures(2)
    said = [
        {"role": "user", "content": [{"type": "image", "url": one}, {"type": "text", "text": "Is there a dog?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image", "url": two}]},
    ]
    chat.task_dict["mine"] = {"test": [None]}

    def ask(content):
        return chat.generate_until(
            [
                Instance(
                    "generate_until",
                    ("", lambda doc: content, {"max_new_tokens": 8}, 0, "mine", "test"),
                    0,
                    {"task": "mine", "doc_id": 0, "repeats": 1},
                )
            ]
        )[0].text

    assert ask(said[:1]) == answers(model, ["Is there a dog?"], [[one]])[0]
    texts = []
    real, chat.processor.apply_chat_template = (
        chat.processor.apply_chat_template,
        lambda *args, **more: texts.append(real(*args, **more)) or texts[-1],
    )
    assert ask(said)
    assert texts == ["USER: <image>\nIs there a dog? ASSISTANT: No.</s>USER: And here?<image>\n ASSISTANT:"]
    chat.template = "USER: {images:<image>\n}{prompt} ASSISTANT:"
    assert ask(said[:1]) == answers(model, ["Is there a dog?"], [[one]])[0]
    with pytest.raises(InputError, match="one turn, the user's, not 3 messages"):
        ask(said)
    with pytest.raises(InputError, match="kind video"):
        ask([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_repeats_are_drawn_anew_and_lmms_evals_seed_repeats_them(model):
    asked = requests(model, [CAPTION_PROMPT], [pictures(1)], {"max_new_tokens": 12, "temperature": 1.5}) * 3
    torch.manual_seed(7)
    first = [answer.text for answer in model.generate_until(asked)]
    assert len(set(first)) > 1
    torch.manual_seed(7)
    assert [answer.text for answer in model.generate_until(asked)] == first


def test_answers_are_cached(evaluate, model, place, monkeypatch):
    """lmms-eval's --use_cache, and the hook that older caches of its use."""
    kept = []
    monkeypatch.setattr(
        model, "cache_hook", type("Hook", (), {"add_partial": staticmethod(lambda *row: kept.append(row))})
    )
    assert [answers(model, ["Is there a dog?"], [pictures(1)])[0]] == [row[2] for row in kept] and kept[0][:2] == (
        "generate_until",
        ("Is there a dog?", {"max_new_tokens": 8}),
    )
    first, _ = evaluate("decoder=[]", batch_size=3, use_cache=str(place / "responses"))
    monkeypatch.setattr(adapter.Simple, "generate_until", lambda self, requests: pytest.fail("asked again"))
    assert evaluate("decoder=[]", batch_size=3, use_cache=str(place / "responses"))[0] == first


def test_what_a_stack_cannot_do(model):
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.generate_until_multi_round([])
