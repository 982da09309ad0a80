"""lmms-eval's own CHAIR, POPE and AMBER with a stack, on pictures of scenes in the format of their data; its metrics
beside ours on the same answers. Nothing is fetched: each task is a yaml that includes lmms-eval's and names local data.
"""

import json
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

evaluator = pytest.importorskip(
    "lmms_eval.evaluator",
    reason="lmms-eval is not installed, or not what it needs; docs/lmms-eval.md says what to install",
    exc_type=ImportError,
)

import datasets
import lmms_eval.models
from lmms_eval.tasks import TaskManager

from experiments.metrics import chair
from experiments.scenes import world
from experiments.tasks import AmberGenerative, Scenes, ScenesPope

ROOT = Path(__file__).resolve().parents[2]
OWN = Path(lmms_eval.__file__).parent / "tasks"
FILES = {"chair": "coco_cap_chair/coco_cap_chair.yaml", "pope": "pope/pope.yaml", "amber": "amber_g/amber_g.yaml"}
YAML = """
include: {included}
task: own_{name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{max_new_tokens: 50, temperature: 0, num_beams: 1, do_sample: false, until: []}}
"""
COUNT = 6
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all((OWN / file).is_file() for file in FILES.values()), reason="a wheel without its tasks"),
]


def _rows() -> dict[str, list[dict]]:
    """Documents of each task, with the columns of the published data sets that lmms-eval reads."""
    scenes, asked = Scenes("validation", "typical", 0, COUNT).items(), ScenesPope("validation", "typical", count=COUNT)
    there = [{"image": item.open(), "question_id": n, "gt_object": item.objects} for n, item in enumerate(scenes)]
    absent = [[name for name in ("dog", "car", "person") if name not in item.objects] for item in scenes]
    return {
        "chair": there,
        "pope": [
            {"image": i.open(), "question_id": str(n), "question": i.question, "answer": i.truth["label"]}
            for n, i in enumerate(asked.items())
        ],
        "amber": [
            {"image": row["image"], "question_id": row["question_id"], "truth": row["gt_object"], "hallu": hallu}
            for row, hallu in zip(there, absent, strict=True)
        ],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data, the yaml files, AMBER's tables and the entry points of this package."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tasks").mkdir()
    rows = _rows()
    for name, included in FILES.items():
        images = datasets.Dataset.from_list(rows[name]).cast_column("image", datasets.Image())
        images.to_parquet(folder / f"{name}.parquet")
        text = YAML.format(name=name, included=OWN / included, file=folder / f"{name}.parquet")
        (folder / f"tasks/own_{name}.yaml").write_text(text)
    (folder / "metadata").mkdir()
    names = {category: [] for category in world.CATEGORIES}
    (folder / "metadata/relation.json").write_text(json.dumps(names))
    (folder / "metadata/annotations.json").write_text("[]")
    (folder / "metadata/safe_words.txt").write_text("picture\n")
    kinds = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    started = "".join(f"{kind}_score=0\n{kind}_num=0\n" for kind in kinds)
    (folder / "metadata/metrics.txt").write_text(started.replace("chair_num=0", "chair_num=0.001"))  # as published
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = folder / "site/prunehal-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prunehal\nVersion: 0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text("[lmms_eval.models]\n" + lines)
    return folder


@pytest.fixture
def evaluate(place, monkeypatch):
    """`evaluate(name)`: the documents, the answers and the metrics of a task. NLTK's and spaCy's data have to be
    fetched, so that a tokeniser, tags and a lemmatiser stand in for them, and no two words are similar.
    """
    nltk, corpus, stem, spacy = (types.ModuleType(n) for n in ("nltk", "nltk.corpus", "nltk.stem", "spacy"))
    nltk.word_tokenize = lambda text: re.findall(r"[a-z]+(?:-[a-z]+)*|[^a-z\s]", text.lower())
    nltk.pos_tag = lambda tokens: [(t, "NN") for t in tokens]
    corpus.wordnet = types.SimpleNamespace(ADJ="a", VERB="v", NOUN="n", ADV="r")
    stem.WordNetLemmatizer = lambda: types.SimpleNamespace(lemmatize=lambda word, pos="n": chair.singular(word))
    alike = lambda a, b: float(a.text == b.text)  # noqa: E731
    word = type("Word", (types.SimpleNamespace,), {"similarity": alike})
    spacy.Language = type("Language", (), {})  # datasets looks for it
    spacy.load = lambda name: lambda text: word(text=text)
    for name, module in (("nltk", nltk), ("nltk.corpus", corpus), ("nltk.stem", stem), ("spacy", spacy)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(place / "site")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setenv("AMBER_BASE_DIR", str(place))
    lmms_eval.models.MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)

    def run(name):
        manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
        arguments = dict(model="prunehal", model_args="decoder=[prunehal],decoder.prunehal.r=0.5", batch_size=3)
        found = evaluator.simple_evaluate(tasks=[f"own_{name}"], task_manager=manager, bootstrap_iters=0, **arguments)
        rows = sorted(found["samples"][f"own_{name}"], key=lambda row: row["doc_id"])
        metrics = {key.removesuffix(",none"): value for key, value in found["results"][f"own_{name}"].items()}
        return [row["filtered_resps"][0] for row in rows], metrics

    return run


def test_chair_of_the_same_captions_is_the_same(evaluate):
    captions, theirs = evaluate("chair")
    assert len(captions) == COUNT and all(len(text.split()) > 5 for text in captions)
    items = Scenes("validation", "typical", 0, COUNT).items()
    ours = chair.summary([chair.score(c, i.objects) for c, i in zip(captions, items, strict=True)], draws=2)
    assert theirs["coco_cap_chair_i"] == pytest.approx(ours["chair_i"]["value"])
    assert theirs["coco_cap_chair_s"] == pytest.approx(ours["chair_s"]["value"])
    assert theirs["coco_cap_recall"] == pytest.approx(ours["recall"]["value"])


def test_pope_takes_a_bare_yes_or_no_only_and_ours_a_sentence(evaluate):
    answers, theirs = evaluate("pope")
    task = ScenesPope("validation", "typical", count=COUNT)
    items = task.items()
    assert len(answers) == len(items) > COUNT
    rows = [{"caption": a, "objects": i.objects, **i.truth} for a, i in zip(answers, items, strict=True)]
    ours = task.rates(task.counts(rows).sum(0))
    bare = [a.strip().lower() == row["label"] for a, row in zip(answers, rows, strict=True)]
    assert theirs["pope_accuracy"] == pytest.approx(sum(bare) / len(bare))
    assert 100 * theirs["pope_accuracy"] < ours["accuracy"]  # "Yes, there is." is none of its two words


def test_amber_counts_nouns_as_ours(evaluate, place):
    captions, theirs = evaluate("amber")
    task = AmberGenerative(str(place), str(place))
    task._relation = lambda: {name: [] for name in world.CATEGORIES}
    task._safe = lambda: {"picture"}
    rows = [
        {"caption": text, "truth": row["truth"], "hallu": row["hallu"]}
        for text, row in zip(captions, _rows()["amber"], strict=True)
    ]
    ours = task.rates(task.counts(rows).sum(0))
    for name in ("chair", "cover", "hal", "cog"):
        assert theirs[f"amber_{name}"] == pytest.approx(ours[name], rel=1e-3), name
