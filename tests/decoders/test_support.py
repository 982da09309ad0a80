"""What users do around a stack: each is supported, and equal to the plain way, or refused with the reason."""

import copy
import pickle
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import stacks
import tiny
import torch
from references.masked_prunehal import masked_prunehal
from tiny import families
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    TextStreamer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from baselines import OPERA, VCD, DeCo, DoLa
from decoders import Branch, Decoder, RawInputs, Requirements, Stack, StackError, hf
from prunehal import PruneHal

GREEDY = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
FULL = GREEDY | dict(return_dict_in_generate=True, output_logits=True, output_scores=True)
STACKS = {
    "prunehal": lambda: [PruneHal(r=0.6, t=3)],
    "vcd": lambda: [VCD()],
    "dola": lambda: [DoLa([0, 1])],
    "opera": lambda: [OPERA(num_candidates=4)],
    "opera+prunehal": lambda: [OPERA(num_candidates=4), PruneHal(r=0.6, t=3)],
}


def run(model, name: str, inputs: dict, **options):
    stack = Stack(STACKS[name]())
    out = stack.generate(model, **inputs, **GREEDY | dict(return_dict_in_generate=True, output_logits=True) | options)
    if "prunehal" in name:
        assert all(row["prunes"] for row in stack.record["prunehal"])
    return out


def same(a, b, **close):
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), **{"atol": 2e-3, "rtol": 1e-4} | close)


# attention backends


def _flash(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Flash attention's contract: causal, within a window, and a mask of padding, [n, t], or none; newer ones know caps
    and sinks.
    """
    assert module.config._attn_implementation == "flash_test" and (attention_mask is None or attention_mask.ndim == 2)
    q, t = query.shape[2], key.shape[2]
    mask = torch.ones(q, t, dtype=torch.bool).tril(t - q)
    if sliding_window is not None:
        mask = mask.triu(t - q - sliding_window + 1)
    mask = mask[None, None]
    if attention_mask is not None:
        mask = mask & (attention_mask[:, None, None, -t:].bool() | torch.eye(t, dtype=torch.bool)[t - q :])
    seen.append(q)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
        )
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    own = sys.modules[module.__class__.__module__].eager_attention_forward
    return own(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0], None


seen: list[int] = []
AttentionInterface.register("flash_test", _flash)
AttentionMaskInterface.register("flash_test", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


@pytest.fixture
def backend():
    """Sets a model's attention backend, and puts the old one back."""
    with ExitStack() as changed:
        yield lambda model, name: changed.enter_context(hf.attention_replaced(model, name))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("attention", ["eager", "flash_test"])
def test_every_backend_gives_what_sdpa_gives(attention, name, num_beams, backend):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    expected = run(model, name, inputs, num_beams=num_beams)
    backend(model, attention)
    seen.clear()
    same(run(model, name, inputs, num_beams=num_beams), expected)
    if attention == "flash_test":
        prompt = inputs["input_ids"].shape[1]
        assert seen.count(prompt) == (6 if name == "vcd" else 3), (
            "the prefill of all three layers, and of a branch, stays on flash attention"
        )
    assert hf.attention_name(model) == attention


def test_what_reads_nothing_runs_on_any_backend_and_the_rest_is_refused(backend):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    AttentionInterface.register("other_test", sdpa_attention_forward)
    AttentionMaskInterface.register("other_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    expected = {name: run(model, name, inputs) for name in ("vcd", "dola")}
    backend(model, "other_test")
    for name, out in expected.items():
        same(run(model, name, inputs), out)
    for name in ("prunehal", "opera"):
        with pytest.raises(
            StackError,
            match="attn_implementation='other_test'; load the model with one of sdpa, eager, flash_attention_2",
        ):
            run(model, name, inputs)


MIXED = dict(head_dim=12, sliding_window=12, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
UNUSUAL = {
    "a cap on scores": lambda: Gemma2Config(**tiny.TEXT, **MIXED, query_pre_attn_scalar=12, attn_logit_softcapping=1.0),
    "sinks": lambda: GptOssConfig(**tiny.TEXT, **MIXED, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("attention", ["eager", "flash_test"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_attention_with_a_cap_or_sinks(kind, attention, backend):
    """Also where masks of the loop's own keep a layer from the model's own function; and the rows read are those of
    transformers.
    """
    torch.manual_seed(4)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION),
        text_config=UNUSUAL[kind](),
        image_token_index=tiny.IMAGE,
        vision_feature_layer=-1,
    )
    model, inputs = tiny.lively(LlavaForConditionalGeneration(config).eval()), tiny.inputs("llava", 2)
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.data.fill_(1.5)
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    backend(model, "eager")  # which knows caps; sdpa of 5.17 leaves them out without a word
    expected = model.generate(**inputs, **options, output_attentions=True)
    backend(model, attention)
    for decoders in ([VCD(alpha=0, beta=0)], [PruneHal(r=1)], [OPERA(penalty=0, threshold=None, num_candidates=6)]):
        stack = Stack(decoders)
        same(stack.generate(model, **inputs, **options), expected)
        if isinstance(decoders[0], PruneHal):
            visual = inputs["input_ids"] == tiny.IMAGE
            for i, row in enumerate(stack.record["prunehal"]):
                level = torch.stack(
                    [step[1][i, :, -1, : visual.shape[1]][:, visual[i]].mean() for step in expected.attentions]
                )
                torch.testing.assert_close(row["attention"][:, 0], level[: len(row["attention"])], atol=1e-5, rtol=1e-4)
    same(
        run(model, "opera+prunehal", inputs, num_beams=3),
        _on(model, "eager", lambda: run(model, "opera+prunehal", inputs, num_beams=3)),
    )


def _on(model, name: str, make):
    """What `make` gives on another attention backend."""
    with hf.attention_replaced(model, name):
        return make()


# numbers and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STACKS)
def test_half_precision(dtype, name):
    model = copy.deepcopy(tiny.model("llava")).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs("llava", 2).items()}
    out = run(model, name, inputs, num_beams=2)
    assert torch.stack(out.logits).isfinite().all() and out.sequences.shape[1] == inputs["input_ids"].shape[1] + 10
    whole = run(tiny.model("llava"), name, tiny.inputs("llava", 2), num_beams=2)
    assert (out.logits[0] - whole.logits[0]).abs().max() < (0.1 if dtype is torch.bfloat16 else 0.02) * whole.logits[
        0
    ].abs().max()


def test_layers_that_are_kept_elsewhere(tmp_path):
    """device_map: accelerate brings each module's weights and inputs together; here from disk."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    expected = run(model, "opera+prunehal", inputs)
    places = {name: "cpu" for name, _ in model.named_modules() if name.count(".") == 1} | {"lm_head": "cpu"}
    del places["model.language_model"]
    places |= {
        f"model.language_model.{name}": "cpu"
        for name, _ in model.model.language_model.named_children()
        if name != "layers"
    }
    places |= {f"model.language_model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    spread = accelerate.dispatch_model(
        copy.deepcopy(model), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    same(run(spread, "opera+prunehal", inputs), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    even = {**tiny.VISION, "hidden_size": 64, "intermediate_size": 128}  # blocks of 64 weights
    text = LlamaConfig(**tiny.TEXT | dict(hidden_size=64, intermediate_size=128))
    tiny.lively(
        LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**even),
                text_config=text,
                image_token_index=tiny.IMAGE,
                vision_feature_layer=-1,
            )
        )
    ).save_pretrained(tmp_path)
    options = dict(load_in_8bit=True) if bits == 8 else dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    assert any("bit" in type(module).__name__ for module in model.modules())
    inputs = tiny.inputs("llava", 2)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    for name in STACKS:
        assert torch.stack(run(model, name, inputs).logits).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prunehal", "opera+prunehal"])
def test_long_answers(name):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    out = run(model, name, inputs, max_new_tokens=2048, output_logits=False)
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 2048


def test_a_prompt_longer_than_the_image():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    words = torch.randint(20, tiny.VOCAB, (1, 300), generator=torch.Generator().manual_seed(1))
    inputs |= {
        name: torch.cat([inputs[name], more], 1)
        for name, more in (("input_ids", words), ("attention_mask", torch.ones_like(words)))
    }
    assert torch.equal(Stack([PruneHal(r=1)]).generate(model, **inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    run(model, "prunehal", inputs)


# models in wrappers


def test_adapters():
    peft = pytest.importorskip("peft")
    inputs = tiny.inputs("llava", 2)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.model("llava")), config).eval()
    got = {name: run(wrapped, name, inputs) for name in STACKS}
    merged = wrapped.merge_and_unload()
    for name, out in got.items():
        same(out, run(merged, name, inputs))
    assert not torch.equal(got["dola"].sequences, run(tiny.model("llava"), "dola", inputs).sequences)


def test_adapters_that_put_tokens_before_the_prompt_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(tiny.model("llava")),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            tokenizer_name_or_path=None,
            token_dim=48,
            num_layers=3,
            num_attention_heads=4,
        ),
    ).eval()
    for stack in (Stack([]), Stack([DoLa([1])])):
        with pytest.raises(StackError, match="PROMPT_TUNING. puts virtual tokens before the prompt"):
            stack.generate(model, **tiny.inputs("llava"), **GREEDY)


def test_compiled_models_are_refused_by_decoders():
    model, inputs = copy.deepcopy(tiny.model("llava")), tiny.inputs("llava")
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(StackError, match="prunehal cannot act on .*compiled"):
        run(model, "prunehal", inputs)
    assert torch.equal(Stack([]).generate(model, **inputs, **GREEDY), tiny.model("llava").generate(**inputs, **GREEDY))
    other = copy.deepcopy(tiny.model("llava"))
    other.compile(backend="eager")
    with pytest.raises(StackError, match="dola cannot act on .*compiled"):
        run(other, "dola", inputs)


def test_tensor_parallel_models_are_refused():
    model = copy.deepcopy(tiny.model("llava"))
    model._tp_size = 2  # what transformers notes when it splits the weights
    with pytest.raises(StackError, match="tensor parallelism"):
        run(model, "prunehal", tiny.inputs("llava"))


def test_fsdp_models_are_refused():
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = copy.deepcopy(tiny.model("llava"))
        fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(StackError, match="FSDP"):
            run(model, "prunehal", tiny.inputs("llava"))
    finally:
        distributed.destroy_process_group()
    with pytest.raises(StackError, match="synced_gpus"):
        run(tiny.model("llava"), "prunehal", tiny.inputs("llava"), synced_gpus=True)


# what generate offers besides


def test_assistants_are_refused_and_words_that_may_be_taken_back_are_not_streamed():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    with pytest.raises(StackError, match="assistant models draft tokens outside this loop"):
        run(model, "dola", inputs, assistant_model=model)
    with pytest.raises(StackError, match="opera may take words back, which a streamer cannot"):
        run(model, "opera", inputs, streamer=TextStreamer(None))
    with pytest.raises(StackError, match="chunked prefill is not supported"):
        run(model, "dola", inputs, prefill_chunk_size=4)


# threads


def test_one_stack_in_two_threads():
    """On one model, with different inputs: each thread gets what it would get alone, and its own record."""
    model, stack = tiny.model("llava"), Stack([OPERA(num_candidates=4), PruneHal(r=0.6, t=3)])
    inputs = [tiny.inputs("llava", 2, seed=seed) for seed in range(4)]
    alone = []
    for one in inputs:
        alone.append((stack.generate(model, **one, **GREEDY), stack.record["prunehal"]))
    found: dict[int, list] = {}

    def work(first: int):
        mine = found[first] = []
        for i in (first, first + 2):
            mine.append((i, stack.generate(model, **inputs[i], **GREEDY), stack.record["prunehal"]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sum(map(len, found.values())) == 4
    for i, ids, record in (one for mine in found.values() for one in mine):
        assert torch.equal(ids, alone[i][0])
        assert [row["prunes"] for row in record] == [row["prunes"] for row in alone[i][1]]
    assert stack.record["prunehal"] is alone[3][1], "this thread's own last generation"


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_transformers_own_generate_in_another_thread(family):
    """What is hooked into the model for a stack acts in its thread only: neither sees anything of the other."""
    model = tiny.model("llava") if family == "llava" else families.model("gemma3")
    inputs = (
        [tiny.inputs("llava", 2, seed=seed) for seed in (0, 5)]
        if family == "llava"
        else [families.inputs("gemma3", *zip(families.prompt(seed, 5, (32, 32)))) for seed in (1, 2)]
    )
    options = GREEDY | dict(max_new_tokens=40, return_dict_in_generate=True, output_logits=True, output_scores=True)
    stack = Stack([DoLa([0, 1]), PruneHal(r=0.6, t=3)])
    alone, plain = stack.generate(model, **inputs[0], **options), model.generate(**inputs[1], **options)
    found, done = [], threading.Event()

    def work():
        while not done.is_set():
            found.append(model.generate(**inputs[1], **options))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            out = stack.generate(model, **inputs[0], **options)
            same(out, alone)
            torch.testing.assert_close(torch.stack(out.scores), torch.stack(alone.scores), atol=2e-3, rtol=1e-3)
    finally:
        done.set()
        thread.join()
    for out in found:
        same(out, plain)


def test_a_stack_goes_to_another_process():
    stack = Stack([PruneHal(r=0.6, t=3)])
    expected = stack.generate(tiny.model("llava"), **tiny.inputs("llava"), **GREEDY)
    for other in (pickle.loads(pickle.dumps(stack)), copy.deepcopy(stack)):
        assert [row["prunes"] for row in other.record["prunehal"]] == [
            row["prunes"] for row in stack.record["prunehal"]
        ]
        assert torch.equal(other.generate(tiny.model("llava"), **tiny.inputs("llava"), **GREEDY), expected)


# caches


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized"])
def test_other_caches_are_refused_by_decoders(kind):
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    with pytest.raises(StackError, match=f"cache_implementation='{kind}'"):
        run(model, "prunehal", inputs, cache_implementation=kind)


def test_a_checkpoint_that_asks_for_a_hybrid_cache():
    """As Gemma 3's generation config does; transformers no longer takes it at its word."""
    model = copy.deepcopy(families.model("gemma3"))
    inputs = families.inputs("gemma3", *zip(families.prompt(1, 4, (48, 32))))
    expected = run(model, "opera+prunehal", inputs)
    model.generation_config.cache_implementation = "hybrid"
    same(run(model, "opera+prunehal", inputs), expected)
    model.generation_config.cache_implementation = "static"
    with pytest.raises(StackError, match="StaticCache"):
        run(model, "prunehal", inputs)


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_other_caches_serve_the_empty_stack(kind):
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads from a GPU only")
    options = GREEDY | dict(cache_implementation=kind, disable_compile=True)
    assert torch.equal(Stack([]).generate(model, **inputs, **options), model.generate(**inputs, **GREEDY))


def test_a_second_turn():
    """The empty stack goes on from a cache as transformers does; what decoders leave behind, only a stack continues
    (test_second_turn.py); and what transformers leaves, only the empty stack.
    """
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    more = torch.tensor([[30, 31, 32]])

    def turn(first, generate):
        ids = torch.cat([first.sequences, more], 1)
        return generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(hf.cache_of(first)),
            **GREEDY,
        )

    options = GREEDY | dict(return_dict_in_generate=True)
    expected = turn(model.generate(**inputs, **options), model.generate)
    first = Stack([]).generate(model, **inputs, **options)
    assert torch.equal(turn(first, model.generate), expected)
    assert torch.equal(turn(first, lambda **k: Stack([]).generate(model, **k)), expected)
    pruned = Stack([PruneHal(r=0.5)]).generate(model, **inputs, **options)
    with pytest.raises(StackError, match="may have pruned it: only a stack continues"):
        turn(pruned, model.generate)
    theirs = model.generate(**inputs, **options)
    with pytest.raises(
        StackError, match="filled cache that no decoders of a stack left; pass the whole .*apply_chat_template"
    ):
        turn(theirs, lambda **k: Stack([PruneHal()]).generate(model, **k))
    whole = torch.cat([pruned.sequences, more], 1)
    again = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    assert Stack([PruneHal(r=0.5)]).generate(model, **again, **GREEDY).shape[1] == whole.shape[1] + 10
    with pytest.raises(StackError, match="DynamicCache of the caller's own"):
        run(model, "prunehal", inputs, past_key_values=DynamicCache())


# wrappers with ways of their own


def test_a_wrapper_that_makes_the_masks_of_windows_itself():
    """PaliGemma 2 takes one mask only, and makes those of its text model of it; each kind of layer gets its own
    nevertheless.
    """
    torch.manual_seed(5)
    vision = SiglipVisionConfig(**tiny.VISION, projection_dim=48, vision_use_head=False)
    text = Gemma2Config(
        **tiny.TEXT | dict(num_hidden_layers=4),
        head_dim=12,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=None,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=tiny.IMAGE, projection_dim=48, hidden_size=48
    )
    model, inputs = tiny.lively(PaliGemmaForConditionalGeneration(config).eval()), tiny.inputs("llava", 2)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    for num_beams in (1, 3):
        expected = model.generate(**inputs, **options, num_beams=num_beams)
        for decoders in (
            [],
            [VCD(alpha=0, beta=0)],
            [OPERA(penalty=0, threshold=None, num_candidates=6), PruneHal(r=1)],
        ):
            same(Stack(decoders).generate(model, **inputs, **options, num_beams=num_beams), expected)
    asked = dict(
        r=0.6,
        t=3,
        reference="running_mean",
        timing="before",
        sets="per_layer",
        majority="strict",
        forced=True,
        forced_counts=True,
        keep="top",
        top_k=None,
        first_token=False,
    )
    one = {**tiny.one(inputs, 0), "token_type_ids": torch.zeros_like(tiny.one(inputs, 0)["input_ids"])}
    visual = (one["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()

    def by(model, inputs, loop):
        model.generate(**inputs, **GREEDY, custom_generate=loop)

    stack = Stack([PruneHal(**asked)])
    out = stack.generate(model, **one, **options)
    tokens, logits, prunes = masked_prunehal(by, model, one, visual, [1, 3], 10, asked)
    assert out.sequences[0, -10:].tolist() == tokens
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, atol=2e-3, rtol=1e-4)
    assert [(p["step"], p["kept"]) for p in stack.record["prunehal"][0]["prunes"]] == [
        (m, [kept[i] for i in (1, 3)]) for m, kept in prunes
    ]


def test_a_model_that_views_its_inputs_under_beams():
    """Kosmos-2 views what it is given, which inputs of every third row would not allow."""
    torch.manual_seed(5)
    text = dict(
        vocab_size=tiny.VOCAB, embed_dim=48, layers=3, ffn_dim=96, attention_heads=4, max_position_embeddings=256
    )
    model = tiny.lively(
        Kosmos2ForConditionalGeneration(
            Kosmos2Config(text_config=text, vision_config=tiny.VISION, latent_query_num=16)
        ).eval()
    )
    inputs = tiny.inputs("llava", 2)
    inputs["image_embeds_position_mask"] = (inputs["input_ids"] == tiny.IMAGE).long()
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True, num_beams=3)
    expected = model.generate(**inputs, **options)
    for decoders in ([], [VCD(alpha=0, beta=0)]):
        same(Stack(decoders).generate(model, **inputs, **options), expected)


# models whose layers all attend within a window


class DoLaBeside(DoLa):
    """Computes DoLa's scores, and does not use them."""

    def process_logits(self, step, state, scores):
        assert super().process_logits(step, state, scores).shape == scores.shape
        return scores


@pytest.mark.parametrize("window", [64, 12])
def test_a_window_in_every_layer(window):
    """Longer than prompt and answer it never cuts anything; shorter, there is no layer that decoders could read."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    model = tiny.lively(MistralForCausalLM(MistralConfig(**tiny.TEXT, sliding_window=window)).eval())
    ids = torch.randint(20, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(2))
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 3:13] = True
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(Stack([]).generate(model, **inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    stack = Stack([PruneHal(r=0.6, t=3)], visual_mask=visual)
    if window == 12:
        with pytest.raises(
            StackError,
            match=(
                "none of its layers attends to the whole sequence .the window is 12 tokens, prompt and answer may"
                " have 30"
            ),
        ):
            stack.generate(model, **inputs, **GREEDY)
        with pytest.raises(StackError, match="prompt and answer may have 30"):
            stack.generate(
                model,
                inputs_embeds=model.get_input_embeddings()(ids),
                attention_mask=inputs["attention_mask"],
                **GREEDY,
            )
        assert "window is 12" in stack.refusals(model, 30)["prunehal"]
        with pytest.raises(StackError, match="none can be read or pruned"):
            Stack([OPERA()], visual_mask=visual).generate(model, **inputs, **GREEDY)
        inputs["attention_mask"] = (torch.arange(20) >= torch.tensor([[0], [4]])).long()
        for num_beams in (1, 3):  # what neither reads nor prunes acts
            expected = model.generate(**inputs, **FULL, num_beams=num_beams)
            same(
                Stack([DeCo(alpha=0, top_p=1, top_k=None), DoLaBeside([1])]).generate(
                    model, **inputs, **FULL, num_beams=num_beams
                ),
                expected,
            )
        return
    stack.generate(model, **inputs, **GREEDY)
    assert all(row["prunes"] for row in stack.record["prunehal"])
    assert torch.equal(
        Stack([PruneHal(r=1)], visual_mask=visual).generate(model, **inputs, **GREEDY),
        model.generate(**inputs, **GREEDY),
    )


# layers of several kinds


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["gemma3", "aya_vision"])
def test_going_back_with_windows(name, num_beams):
    """Rows that go back and choose the same again lose nothing of what their windows hold, also with a prune
    between.
    """
    model, inputs = (
        families.model(name),
        families.inputs(name, *zip(families.prompt(1, 4, (48, 32)), families.prompt(2, 7, (24, 64)), strict=False)),
    )
    if num_beams > 1 and families.mixed_up(inputs):
        pytest.skip("this transformers mixes up the tiles of a picture under beams")
    for decoders in ([], [PruneHal(r=0.7, t=4)]):
        plain = Stack(decoders).generate(model, **inputs, **FULL, num_beams=num_beams)
        for at, to in ((9, 2), (6, 6)):
            stack = Stack([*decoders, stacks.Rewind(at, to)])
            same(stack.generate(model, **inputs, **FULL, num_beams=num_beams), plain)
            assert stack.record["rewind"] == [1, 1]


@dataclass
class Shorter(Decoder):
    """Contrasts with the prompt without its first two tokens."""

    def requirements(self, model):
        return Requirements(branch=Branch(inputs=self.inputs, pruning="independent"))

    def inputs(self, given):
        names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        return {name: given.tensors[name][:, 2:] for name in names if name in given.tensors}

    def process_logits(self, step, state, scores):
        return 2 * scores - step.branch


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "lfm2_vl"])
def test_a_branch_with_another_prompt(name):
    """The branch's rows stand beside the main ones in windows and running states, though they are shorter."""
    model, inputs = (
        families.model(name),
        families.inputs(name, *zip(families.prompt(1, 4, (48, 32)), families.prompt(2, 7, (24, 64)), strict=False)),
    )
    out = Stack([Shorter()]).generate(model, **inputs, **FULL)
    tokens = out.sequences[:, -10:]

    def along(given):
        """transformers' logits along the answer."""
        at = iter(range(10))
        say = lambda ids, scores: torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, [next(at)]], 0.0)  # noqa: E731
        return torch.stack(model.generate(**given, **FULL, logits_processor=LogitsProcessorList([say])).logits)

    expected = 2 * along(inputs) - along({**inputs, **Shorter().inputs(RawInputs(model, inputs, [0, 0]))})
    torch.testing.assert_close(torch.stack(out.scores), expected, atol=2e-3, rtol=1e-4)


# layers that decoders cannot act on


def test_running_states_cannot_be_taken_back():
    inputs = families.inputs("qwen3_5", *zip(families.prompt(1, 4, (48, 32))))
    with pytest.raises(
        StackError, match="the last prompt token cannot run again, as pruning before the first token needs"
    ):
        Stack([PruneHal(first_token=True)]).generate(families.model("qwen3_5"), **inputs, **GREEDY)
    for decoder in (OPERA(), Goes()):
        with pytest.raises(StackError, match="layers such as 0 keep a running state"):
            Stack([decoder]).generate(families.model("qwen3_5"), **inputs, **GREEDY)


class Goes(Decoder):
    """Would go back."""

    def requirements(self, model):
        return Requirements(lookahead=2, rollback=True)


def test_other_layers_are_refused_by_name():
    sizes = dict(
        vocab_size=200,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    shared = dict(
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=200,
        hidden_size_per_layer_input=8,
    )
    with torch.device("meta"):
        models = {
            "attend in chunks": Llama4ForCausalLM(
                Llama4TextConfig(**sizes, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=16)
            ),
            "share the keys and values of others": Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **shared)),
        }
    for words, model in models.items():
        assert words in Stack([PruneHal()], visual_mask=torch.ones(1, 4, dtype=torch.bool)).refusals(model)["prunehal"]
    assert Stack([DoLa()]).refusals(LlamaForCausalLM(LlamaConfig(**tiny.TEXT))) == {"dola": None}


@pytest.mark.parametrize(
    "name, words", [("florence2", "is an encoder-decoder model"), ("mllama", "cross-attention layers")]
)
def test_models_that_no_stack_decodes_are_known_beforehand(name, words):
    assert words in Stack([VCD()]).refusals(families.model(name))["vcd"]


# what is known without running anything


def test_refusals_are_known_beforehand():
    model = tiny.model("llava")
    assert Stack([PruneHal(), OPERA(), VCD(), DoLa()]).refusals(model) == dict.fromkeys(
        ("prunehal", "opera", "vcd", "dola")
    )
    assert Stack([OPERA()]).refusals(tiny.model("instructblip")) == {"opera": None}
    text = LlamaForCausalLM(LlamaConfig(**tiny.TEXT))
    assert "no image-token id" in Stack([PruneHal(), DoLa()]).refusals(text)["prunehal"]
    assert Stack([PruneHal()], visual_mask=torch.ones(1, 4, dtype=torch.bool)).refusals(text) == {"prunehal": None}


def test_a_model_without_weights_is_refused_by_the_name_of_one():
    with torch.device("meta"):
        net = tiny.FAMILIES["llava"]()
    inputs = {k: v.to("meta") for k, v in tiny.inputs("llava").items()}
    with pytest.raises(StackError, match="LlavaForConditionalGeneration has no values .* is on the meta device"):
        Stack([]).generate(net, **inputs, max_new_tokens=2)
    partly = copy.deepcopy(tiny.model("llava"))
    partly.get_decoder().layers[1].to("meta")
    with pytest.raises(StackError, match=r"layers\.1\.\S+ is on the meta device"):
        Stack([PruneHal()]).generate(partly, **tiny.inputs("llava"), max_new_tokens=2)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_without_a_gpu_is_refused(kind):
    with pytest.raises(StackError, match=f"cache_implementation='{kind}' .* torch finds no GPU here; leave"):
        Stack([]).generate(
            tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=2, do_sample=False, cache_implementation=kind
        )


def test_a_model_without_keys_and_values_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    with pytest.raises(StackError, match="MambaForCausalLM keeps no cache of keys and values"):
        Stack([]).generate(model, input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0)
