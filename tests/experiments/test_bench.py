"""The benchmark runs end to end, and what it compares with computes the same thing."""

import json
import sys
from pathlib import Path

import pytest
import torch

from baselines import OPERA
from decoders import Stack, compiled
from experiments import models
from experiments.bench import decode, lanes, launches, measures, paired, peers, sequential, ways
from experiments.results import Results
from prunehal import PruneHal

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--size", "tiny", "--tokens", "4", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _one_thread():  # the models are so small that more threads only wait for each other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _json(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_every_row_is_measured(capsys):
    decode.main([*TINY, "--search", "greedy", "beam", "--batch", "2"])
    out = capsys.readouterr().out
    found = _json(out)
    assert [(f["search"], f["batch"]) for f in found] == [("greedy", 2), ("beam", 2)]
    for search, f in zip(("greedy", "beam"), found, strict=False):
        names = list(ways.rows(search, 5))
        assert list(f["decode"]) == list(f["prefill"]) == names
        assert all(len(f[figure][name]) == 1 for figure in ("decode", "prefill") for name in names)
        assert f["rollbacks"]["[opera]"] == [0] and f["rollbacks"]["[]"] == []
        assert all(name in out for name in names)
    assert {"transformers beam-5", "opera by C+1 forwards", "[opera,prunehal]"} <= set(found[1]["decode"])


def test_any_stack_is_measured_and_what_the_model_refuses_is_left_out(capsys):
    given = ["--set", "pai.start_layer=1", "icd.insert_ids=[5,6]", "--search", "greedy"]
    decode.main([*TINY, "--stacks", "[pai,prunehal]", "icd", "memvr", *given])
    out = capsys.readouterr().out
    assert list(_json(out)[0]["decode"]) == ["transformers", "[pai,prunehal]", "[icd]"]
    assert "[memvr] is left out: memvr: no block of this model's 4" in out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--stacks", "pia"], "Unknown decoder 'pia'. Did you mean 'pai'?"),
        (["--stacks", "pai", "--set", "pai.alph=1"], "Unknown option of pai 'alph'. Did you mean 'alpha'?"),
        (["--set", "alpha=1"], "'alpha=1' is not NAME.OPTION=VALUE"),
        (["--stacks", "pai", "--set", "pai.alpha=-1"], "pai: alpha"),
    ],
)
def test_stacks_that_cannot_be_are_refused(given, words, capsys):
    with pytest.raises(SystemExit):
        decode.main([*TINY, *given])
    assert words in capsys.readouterr().err


def test_some_rows_under_sampling(capsys):
    decode.main([*TINY, "--search", "sampling", "--only", "vcd,prunehal", "[]"])
    assert list(_json(capsys.readouterr().out)[0]["decode"]) == ["transformers", "[]", "[vcd,prunehal]"]


def test_a_model_of_conf_with_random_weights(capsys, monkeypatch):
    entry = models.entry("llava15_7b")
    small = dict(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2
    )
    for part in ("text_config", "vision_config"):
        entry.random.config[part].update(
            {k: v for k, v in small.items() if part == "text_config" or k != "num_key_value_heads"}
        )
    monkeypatch.setattr(ways.models, "entry", lambda name: entry)
    decode.main(
        [
            "--model",
            "llava15_7b",
            "--tokens",
            "2",
            "--repeats",
            "1",
            "--search",
            "greedy",
            "--batch",
            "2",
            "--only",
            "prunehal",
        ]
    )
    (found,) = _json(capsys.readouterr().out)
    assert found["model"] == "llava15_7b" and found["bandwidth"] > 0
    assert set(found["decode"]) == set(found["read"]) == {"transformers", "[prunehal]"}


def test_what_a_step_reads():
    model, tokens = ways.build("tiny"), 8
    given = ways.inputs(model, 2) | ways.options("greedy", 5)
    found = {name: measures.reads(row, model, given, tokens) for name, row in ways.rows("greedy", 5, True).items()}
    text, slots = model.config.text_config, given["input_ids"].shape[1] + (1 + tokens) / 2  # on average
    a_slot = 2 * 2 * text.num_hidden_layers * text.hidden_size * 4  # rows, keys and values, float32
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    once = 4 * (text.num_hidden_layers * layer + text.vocab_size * text.hidden_size)
    assert measures.weights(model) == once
    assert found["transformers"] == once + a_slot * slots
    pool = found["[]"] - once
    assert a_slot * slots < pool < a_slot * (slots + 64)  # which holds a bucket at most that is idle
    assert found["[] compiled"] == once + pool and found["[vcd]"] == once + 2 * pool
    beam = ways.rows("beam", 3)["opera by C+1 forwards"]
    assert measures.reads(beam, model, given | ways.options("beam", 3), tokens) > 6 * once


def test_compiling_is_measured_with_and_without_what_lies_on_disk(capsys, monkeypatch):
    asked = []

    def apart(args, search, batch, figure, name, environment):
        asked.append((figure, name, environment["TORCHINDUCTOR_CACHE_DIR"]))
        return {"seconds": 20.0 / len(asked), "graphs": 2}

    monkeypatch.setattr(decode, "_apart", apart)
    decode.main([*TINY, "--search", "greedy", "--compiling", "--only", "[] compiled"])
    (found,) = _json(capsys.readouterr().out)
    assert found["compiling"] == {"[] compiled": {"cold": 20.0, "warm": 10.0, "graphs": 2}}
    assert [a[:2] for a in asked] == [("--compile-one", "[] compiled")] * 2 and asked[0][2] == asked[1][2]


@pytest.mark.slow
def test_graphs_on_disk_save_time(capsys):
    decode.main([*TINY, "--search", "greedy", "--compiling", "--only", "[] compiled"])
    (found,) = _json(capsys.readouterr().out)
    one = found["compiling"]["[] compiled"]
    assert one["graphs"] == 1 and 0 < one["warm"] < one["cold"]


def test_a_peer_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mitigv", None)
    with pytest.raises(SystemExit):
        decode.main([*TINY, "--peer", "mitigv"])
    assert "--peer: mitigv is not installed: pip install mitigv" in capsys.readouterr().err


def test_a_peer_is_given_the_same_model_and_inputs():
    pytest.importorskip("mitigv")
    model = ways.build("tiny")
    for search in ("greedy", "beam"):
        given = ways.inputs(model, 1) | ways.options(search, 3)
        for generate in peers.mitigv(search).values():
            assert generate(model, **given, max_new_tokens=5).shape == (1, given["input_ids"].shape[1] + 5)


def test_memory_of_one_row(capsys):
    decode.main([*TINY, "--search", "beam", "--rss", "opera"])
    (found,) = _json(capsys.readouterr().out)
    assert found["peak"] >= found["before"] > 0


def test_profile_names_operators(capsys):
    decode.main([*TINY, "--search", "greedy", "--profile", "prunehal"])
    assert "aten::" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "oprea"], "no row is called 'oprea'"),
        (["--tokens", "0"], "not at least 1"),
        (["--size", "tiny", "--model", "llava15_7b"], "not allowed with"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--model", "lava15_7b"], "Did you mean 'llava15_7b'"),
    ],
)
def test_wrong_arguments(capsys, given, said):
    with pytest.raises(SystemExit):
        decode.main(given)
    assert said in capsys.readouterr().err


@torch.no_grad()
def test_opera_by_forwards_of_its_own_chooses_the_same():
    model = ways.build("tiny")
    for name, p in model.named_parameters():  # so that attention is uneven and answers vary
        if p.ndim >= 2 and "norm" not in name:
            p.mul_(6.0)
    given = ways.inputs(model, 3) | dict(max_new_tokens=24, num_beams=5, do_sample=False)
    settings = OPERA(penalty=3.0, threshold=None)
    ids = sequential.opera(model, **given, settings=settings)
    assert torch.equal(Stack([settings]).generate(model, **given), ids)
    prompt = given["input_ids"].shape[1]
    changed = (Stack([OPERA(penalty=0.0, threshold=None)]).generate(model, **given) != ids)[:, prompt:].any(0)
    assert changed[:10].any() and changed[10:].any()  # both penalties act


def test_what_a_step_launches_and_asks():
    model = ways.build("tiny")
    given = ways.inputs(model, 1)
    plain = launches.of_a_step(Stack([]).generate, model, given)
    read = launches.of_a_step(Stack([PruneHal()]).generate, model, given)
    theirs = launches.of_a_step(decode.rows("greedy", 1)["transformers"].generate, model, given)
    assert plain.launches < theirs.launches + 0.5  # what a bucket of slots costs is a share of a step
    assert plain.asks == 1 and read.launches > plain.launches > 50


def test_graphs_that_a_compiled_step_makes(monkeypatch):
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    model = ways.build("tiny")
    assert launches.graphs(Stack([], compile="on"), model, ways.inputs(model, 1), (4, 70, 70)) == [1, 0, 0]
    torch._dynamo.reset()


def test_two_checkouts_side_by_side(tmp_path, monkeypatch, capsys):
    out = tmp_path / "ms.json"
    words = ["--old", str(ROOT), "--rows", "transformers", "[prunehal]"]
    words += ["--size", "tiny", "--visual", "16", "--repeats", "1", "--tokens", "2", "6", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["paired", *words])
    paired.main()
    assert "new / old" in capsys.readouterr().out
    ms = json.loads(out.read_text())["ms"]
    assert ms["transformers"]["old"] == [] and len(ms["[prunehal]"]["old"]) == len(ms["[prunehal]"]["new"]) == 1


def test_paired_refuses_a_folder_that_is_no_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paired", "--old", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        paired.main()
    assert "--old names a checkout" in capsys.readouterr().err


def test_lanes_that_stay_full_wait_for_no_longer_answer():
    assert lanes.fixed([5, 1, 1, 1], 2) == 6 and lanes.fixed([1, 1, 1, 5], 2) == 6
    assert lanes.full([5, 1, 1, 1], 2) == 5 and lanes.full([1, 1, 1, 5], 2) == 6
    assert lanes.fixed([4, 4, 4], 3) == lanes.full([4, 4, 4], 3) == 4


def test_steps_of_batches_by_the_lengths_that_another_run_tells(tmp_path, monkeypatch, capsys):
    store, task = Results(tmp_path / "results.sqlite"), {"model": "m", "task": {"split": "test"}}
    for label, tokens in (("[]", (40, 20, 10, 40, 30)), ("[x]", (40, 10, 30, 20, 20))):
        run = store.open(label, task | {"decoder": label})
        store.add(run, [{"image": str(i), "tokens": n} for i, n in enumerate(tokens)])
    store.add(store.open("[y]", {"model": "n"}), [{"image": "0", "tokens": 3}])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["lanes", "--results", str(store.file), "--batch", "2"])
    lanes.main()
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines == [
        ["[]", "5", "28", "(10-40)", "2", "110", "0.91", "0.73", "0.64"],
        ["[x]", "5", "24", "(10-40)", "2", "90", "1.00", "0.78", "0.67"],
        ["[y]", "1", "3", "(3-3)", "2", "3", "-", "1.00", "1.00"],
    ]
