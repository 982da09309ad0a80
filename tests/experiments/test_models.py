"""Every model of conf/model: full-size figures against published sizes, prompts against what the model makes of the
picture, loading, and every error.
"""

import json
import shutil
import sys
import time

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from packaging.version import Version
from PIL import Image
from tiny import families
from transformers import AutoConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from decoders import Stack
from experiments import models
from experiments.cli import arguments, dry_run
from experiments.inputs import conf_files
from experiments.inputs.errors import InputError
from experiments.models import processors
from experiments.models.encoding import _filled
from prunehal import PruneHal

PUBLISHED = {  # parameters in billions
    "llava15_7b": 7.06,
    "llava15_13b": 13.35,
    "instructblip_7b": 7.91,
    "llava_next_vicuna_7b": 7.06,
    "llava_next_mistral_7b": 7.57,
    "llava_onevision_qwen2_7b": 8.03,
    "qwen2vl_7b": 8.29,
    "qwen25vl_3b": 3.75,
    "qwen25vl_7b": 8.29,
    "qwen3vl_4b": 4.44,
    "qwen3vl_8b": 8.77,
    "internvl35_8b": 8.53,
    "smolvlm2_2b": 2.25,
    "idefics3_8b": 8.46,
    "gemma3_4b": 4.30,
    "aya_vision_8b": 8.63,
    "glm41v_9b": 10.29,
    "scenes_smol": 0.1367,
}
TOKENS = {  # of one picture of 640 x 480
    "llava15_7b": 576,
    "llava15_13b": 576,
    "instructblip_7b": 32,
    "llava_next_vicuna_7b": 576 + 36 * (48 + 1),
    "llava_next_mistral_7b": 576 + 36 * (48 + 1),
    "llava_onevision_qwen2_7b": 729 + 40 * (54 + 1),
    "qwen2vl_7b": 23 * 17,
    "qwen25vl_3b": 23 * 17,
    "qwen25vl_7b": 23 * 17,
    "qwen3vl_4b": 20 * 15,
    "qwen3vl_8b": 20 * 15,
    "internvl35_8b": 256 * (12 + 1),
    "smolvlm2_2b": 81 * (12 + 1),
    "idefics3_8b": 169 * (12 + 1),
    "gemma3_4b": 256,
    "aya_vision_8b": 169 * (12 + 1),
    "glm41v_9b": 23 * 17,
    "scenes_smol": 576,
}
TINY = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "vision_config": {
        "hidden_size": 32,
        "embed_dim": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "depth": 2,
        "num_attention_heads": 2,
        "num_heads": 2,
        "out_hidden_size": 64,
    },
    "qformer_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 32,
    },
}
SCENES = models.ROOT / "experiments/scenes/model"


def entry(name: str, **changes):
    config = models.entry(name)
    config.update(changes)
    if name == "smolvlm2_2b":
        pytest.importorskip("num2words")
    return config


def tiny(name: str, **changes):
    """An entry for random weights whose layers are few and narrow; pictures and prompts stay those of the full size."""
    config = entry(name, **{"weights": "random", "dtype": "float32", "device": "cpu"} | changes)
    figures = config.random.config
    full = AutoConfig.for_model(**OmegaConf.to_container(figures))
    for part, values in TINY.items():
        for key, value in values.items():
            if hasattr(getattr(full, part, None), key):
                OmegaConf.update(figures, f"{part}.{key}", value, force_add=True)
    special = {
        "qwen2_vl": {"vision_config": {"hidden_size": 64}},  # the width after the merger
        "qwen2_5_vl": {"vision_config": {"fullatt_block_indexes": [1]}},
        "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
        "aya_vision": {"alignment_intermediate_size": 64},
    }
    config.random.config = OmegaConf.merge(figures, special.get(figures.model_type, {}))
    rope = config.random.config.text_config.get("rope_parameters", {})
    if "mrope_section" in rope:
        rope.mrope_section = [1, 1, 2] if "partial_rotary_factor" in rope else [2, 3, 3]
    return config


def picture(width: int = 640, height: int = 480) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def image_tokens(model, inputs) -> list[int]:
    return (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()


def test_every_model_but_the_embedded_and_auto_has_figures():
    without = {"scenes", "auto", "qwen_vl_7b"}
    assert PUBLISHED.keys() == TOKENS.keys() == conf_files.files("model").keys() - without
    for name in conf_files.files("model"):
        config = models.entry(name)
        assert config.keys() == models.entry("scenes").keys(), f"{name} has a field that _base lacks"
        assert (config.random is None) == (name in without)


def test_a_model_that_cannot_run_names_its_successors():
    for how in (models.load, models.skeleton):
        with pytest.raises(InputError, match="neither runs on transformers 5 .* use its successors: model=qwen2vl_7b"):
            how(models.entry("qwen_vl_7b"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(name):
    """On the meta device, in the dtype of the entry, as many parameters as published, and picture tokens within the
    vocabulary.
    """
    config = entry(name)
    model, processor = models.skeleton(config)
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.dtype == getattr(torch, config.dtype)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.0025)
    tokenizer, text = processor.tokenizer, model.config.get_text_config()
    assert max(tokenizer.get_vocab().values()) < text.vocab_size
    assert tokenizer.pad_token_id == text.pad_token_id
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_weights_generate(name):
    """The prompt has the tokens that the picture becomes (the model refuses others), with several pictures a row and
    prompts of unequal length.
    """
    config = tiny(name)
    model, processor = models.load(config)
    template = models.template(config)
    one = models.encode(processor, [picture()], "Please describe this image .", "cpu", template)
    assert image_tokens(model, one) == [TOKENS[name]]
    pair = [[picture(64, 48), picture(100, 60)], picture(64, 48)]
    if name == "instructblip_7b":
        with pytest.raises(InputError, match="a place for one picture, not 2"):
            models.encode(processor, pair, "a", "cpu", template)
        pair = [picture(64, 48), picture(100, 60)]
    rows = models.encode(processor, pair, ["a b c d e f", "a"], "cpu", template)
    single = [
        models.encode(processor, [i], p, "cpu", template) for i, p in zip(pair, ["a b c d e f", "a"], strict=False)
    ]
    counts = [image_tokens(model, s)[0] for s in single]
    assert image_tokens(model, rows) == counts and (
        name == "instructblip_7b" or counts[0] > counts[1] or "onevision" in name
    )
    lengths = [s["input_ids"].shape[1] for s in single]
    assert rows["attention_mask"].sum(1).tolist() == lengths
    if name != "instructblip_7b":  # its picture comes before the padding
        assert all(rows["attention_mask"][i, -n:].all() for i, n in enumerate(lengths))
    for inputs in (one, rows):
        out = Stack([]).generate(model, **inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    assert not model.training and model.generation_config.eos_token_id == model.config.get_text_config().eos_token_id


def test_random_weights_keep_dtype_and_attention():
    model, _ = models.load(tiny("qwen25vl_3b", dtype="bfloat16", attn_implementation="eager"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config._attn_implementation == "eager"
    assert (
        model.generation_config.pad_token_id == 151643
        and model.get_input_embeddings().weight is model.get_output_embeddings().weight
    )


def test_run_with_random_weights(tmp_path, run_here):
    words = [
        "model=qwen25vl_3b",
        "model.weights=random",
        "model.dtype=float32",
        "task.count=1",
        "max_new_tokens=3",
        f"hydra.run.dir={tmp_path}",
        f"results={tmp_path}/results.sqlite",
    ]
    for part, values in tiny("qwen25vl_3b").random.config.items():
        if part in ("text_config", "vision_config"):
            known = models.entry("qwen25vl_3b").random.config[part]
            words += [
                f"{'' if k in known else '+'}model.random.config.{part}.{k}={v}"
                for k, v in values.items()
                if isinstance(v, int) and not isinstance(v, bool)
            ]
    words += [
        "model.random.config.text_config.rope_parameters.mrope_section=[2,3,3]",
        "+model.random.config.vision_config.fullatt_block_indexes=[1]",
    ]
    arguments.check(words)
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2


def test_a_folder_goes_before_the_figures():
    """`scenes`, or any entry whose path is a folder: architecture and processor are read there."""
    loaded, _ = models.load(models.entry("scenes"))
    for config in (
        entry("scenes"),
        entry("llava15_7b", path=str(SCENES)),
        entry("auto", path=str(SCENES), dtype="float32"),
    ):
        model, processor = models.skeleton(config)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
        assert processor.chat_template and models.template(config) is None
    model, _ = models.load(entry("scenes", weights="random"))
    assert model.device.type == "cpu" and not torch.equal(model.lm_head.weight, loaded.lm_head.weight)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llava15_7b", (0.4, 3)),
        ("llava15_13b", (0.4, 3)),
        ("instructblip_7b", (0.7, 2)),
        ("scenes", (0.9, 4)),
        ("qwen2vl_7b", (0.4, 3)),
    ],
)
def test_settings_of_prunehal(name, expected):
    with initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        config = compose("run", [f"model={name}"])
        assert (config.decoder.prunehal.r, config.decoder.prunehal.t) == expected
        assert compose("run", [f"model={name}", "decoder.prunehal.r=0.9"]).decoder.prunehal.r == 0.9
        assert config.model == models.entry(name)  # what run.py gets is what entry() gives


def test_a_model_of_ones_own(tmp_path):
    """A yaml in the user's own config folder, on top of _base; checked and composed alike."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text(
        yaml.safe_dump({"defaults": ["_base", "_self_"], "path": "x/y", "settings": {"prunehal": {"r": 0.2}}})
    )
    words = ["model=mine", "model.dtype=float32", "model.settings.prunehal.r=0.3"]
    arguments.check([f"--config-dir={tmp_path}", *words])
    with initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        config = compose("run", [f"hydra.searchpath=[file://{tmp_path}]", *words])
    assert config.model.path == "x/y" and config.model.weights == "pretrained" and config.decoder.prunehal.r == 0.3


def test_words_of_the_command_line():
    arguments.check(
        [
            "model=qwen2vl_7b",
            "model.random.config.text_config.num_hidden_layers=2",
            "model.quantization=4bit",
            "+model.settings.vcd.alpha=2",
        ]
    )
    for words, text in (
        (["model=_base"], "Unknown model '_base'"),
        (["model=qwen2vl"], "Did you mean 'qwen2vl_7b'"),
        (["model=llava15_7b", "model.dtpe=x"], "Did you mean 'model.dtype'"),
        (["model.settings.prunehal.timing=after"], "'+model.settings.prunehal.timing=VALUE'"),
        (["model.random.config.x=1"], "model=scenes does not state model.random.config.x"),
        (["model=llava15_7b", "model.random.template.x=1"], "does not state"),
    ):
        with pytest.raises(InputError) as error:
            arguments.check(words)
        assert text in str(error.value) and "_base" not in str(error.value).partition("Valid")[2]


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("auto", {}, "model.path=FOLDER_OR_HUB_ID"),
        ("auto", {"weights": "random"}, "model.path=FOLDER_OR_HUB_ID"),
        ("auto", {"path": "nobody/nothing"}, "Offline: download it"),
        ("llava15_7b", {}, "model.weights=random"),
        ("scenes", {"weights": "rand"}, "Did you mean 'random'"),
        ("scenes", {"dtype": "float8"}, "Valid: bfloat16, float16, float32"),
        ("scenes", {"device": "cda"}, "model.device is auto, cpu, cuda"),
        ("scenes", {"quantization": "3bit"}, "Valid: 4bit, 8bit, null"),
        ("scenes", {"attn_implementation": "spda"}, "sdpa"),
        ("scenes", {"path": "/tmp/no/such"}, "there is no folder '/tmp/no/such'"),
        ("scenes", {"device_map": "atuo"}, "Did you mean 'auto'"),
        ("scenes", {"path": "~/no/such"}, "there is no folder '~/no/such'"),
        ("scenes", {"prompt": 5}, "model.prompt is a text, not 5"),
        ("scenes", {"path": "/tmp"}, "could not load the model '/tmp'"),
        (
            "llava15_7b",
            {"weights": "random", "quantization": "4bit", "adapter": "x"},
            "model.quantization and model.adapter cannot be had",
        ),
    ],
)
def test_errors_of_load(name, changes, words):
    with pytest.raises(InputError) as error:
        models.load(entry(name, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"weights": "rand"}, "Did you mean 'random'"),
        ({"quantization": 4}, "Did you mean '4bit'"),
        ({"weights": "random", "device_map": "auto"}, "cannot be had with model.weights=random"),
        ({"prompt": 5}, "model.prompt is a text"),
        ({"path": "./llava"}, "there is no folder './llava'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(changes, words):
    with pytest.raises(InputError, match=words):
        dry_run.sheet(entry("llava15_7b", **changes), picture(40, 30), 4)


def test_a_dry_run_takes_the_template(tmp_path):
    """Of a folder without a chat template too; the command line's backslash-n is a new line."""
    folder = tmp_path / "model"
    shutil.copytree(models.ROOT / "experiments/scenes/model", folder)
    (folder / "chat_template.jinja").unlink()
    config = entry("auto", path=str(folder))
    with pytest.raises(InputError, match="no chat template"):
        dry_run.sheet(config, picture(40, 30), 4)
    words = [r'model.template="USER: {images:<image>\n}{prompt} ASSISTANT:"']
    arguments.check(words)
    with initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        config.template = compose("run", words).model.template
    assert models.template(config) == "USER: {images:<image>\n}{prompt} ASSISTANT:"
    assert dry_run.sheet(config, picture(40, 30), 4).visual == 196


def test_packages_that_are_missing_are_named(monkeypatch):
    for change, missing, words in (
        ({"quantization": "8bit"}, ["bitsandbytes"], "pip install bitsandbytes"),
        ({"quantization": "8bit"}, ["accelerate"], "accelerate"),
        ({"device_map": "auto"}, ["accelerate"], "pip install accelerate"),
        ({"adapter": "folder"}, ["peft"], "pip install peft"),
    ):
        with monkeypatch.context() as patch:
            for package in ("bitsandbytes", "accelerate", "peft"):
                patch.setattr(models.loading, f"is_{package}_available", lambda *_, there=package not in missing: there)
            with pytest.raises(InputError, match=words):
                models.load(entry("scenes", **change))
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(InputError, match="needs a package that is not installed: .*num2words"):
        models.skeleton(models.entry("smolvlm2_2b"))


def test_figures_that_do_not_fit():
    for key, value, words in (
        ("text_config.num_attention_heads", 3, "not a multiple"),
        ("model_type", "lava", "Unrecognized model"),
        ("attn", None, None),
    ):
        config = entry("llava15_7b", weights="random")
        if words is None:
            config.attn_implementation, words = "spda", "could not build this architecture"
        else:
            OmegaConf.update(config.random.config, key, value, force_add=True)
        with pytest.raises(InputError, match=words):
            models.skeleton(config)
    with pytest.raises(InputError, match="leave no place for <unk>"):
        processors.synthetic(
            {"type": "LlavaProcessor", "image_processor": {"type": "CLIPImageProcessorPil"}, "tokens": {"<a>": 3}}
        )
    with pytest.raises(InputError, match="could not load the model 'nobody/nothing'.*\nOffline.*\n.*model=scenes.$"):
        models.skeleton(entry("auto", path="nobody/nothing"))
    with pytest.raises(InputError, match="Did you mean 'llava15_7b'"):
        models.entry("lava15_7b")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub that cannot be reached, and an empty cache, whose folder is the first value; what the hub was asked is the
    second.
    """
    client, asked = type(huggingface_hub.get_session()), []
    library = sys.modules[client.__module__.partition(".")[0]]  # httpx, or what took its place

    def refuse(request):
        asked.append(str(request.url))
        raise library.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
    huggingface_hub.close_session()
    monkeypatch.setattr(
        huggingface_hub.utils._http,
        "_GLOBAL_CLIENT_FACTORY",
        lambda: client(transport=library.MockTransport(refuse)),
    )
    yield tmp_path / "cache", asked
    huggingface_hub.close_session()


def test_hub_out_of_reach_is_asked_once_and_the_error_says_what_to_do(no_network):
    for run in (models.load, models.skeleton):
        no_network[1].clear()
        with pytest.raises(InputError) as error:
            run(entry("auto", path="nobody/nothing", device="cpu"))
        assert len(no_network[1]) == 1
        said = str(error.value)
        assert "'nobody/nothing': it is not in the local cache" in said and len(said.splitlines()) == 3
        assert "cannot be reached (Name or service not known)" in said
        assert "hf download nobody/nothing --local-dir FOLDER" in said and "model.path=FOLDER" in said


def test_hub_out_of_reach_is_not_needed_for_what_is_in_the_cache(no_network):
    cache, asked = no_network
    place = cache / "models--nobody--scenes"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("0" * 40)).symlink_to(SCENES)
    model, processor = models.load(entry("scenes", path="nobody/scenes", device="cpu"))
    assert model.config.model_type == "llava" and processor.tokenizer.padding_side == "left" and len(asked) == 1


def test_no_hub_is_asked_where_the_environment_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", None)
    with pytest.raises(InputError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        models.load(entry("llava15_7b", device="cpu"))


@pytest.fixture(scope="module")
def llava():
    return models.skeleton(models.entry("llava15_7b"))[1]


@pytest.mark.parametrize(
    "rows, prompt, template, words",
    [
        (1, "a", None, "model.template="),
        (2, ["a"], "{prompt}", "1 prompts for 2 rows"),
        ([[], [1]], "a", "{images:<image>}{prompt}", "at least one"),
        (1, "a", "{images:<image>}{promt}", "{prompt} and {images:PLACEHOLDER}"),
        (1, "a", "{images:<image>}{prompt", "could not fill in"),
        (1, "a", "{images:<image>}", "no place for {prompt}"),
        ([[1, 1]], "a", "<image>{prompt}", "a place for one picture, not 2"),
        (1, "a", "{prompt}", "takes no such pictures and prompt"),
    ],
)
def test_errors_of_encode(llava, rows, prompt, template, words):
    images = [picture(40, 30)] * rows if isinstance(rows, int) else [[picture(40, 30) for _ in row] for row in rows]
    with pytest.raises(InputError) as error:
        models.encode(llava, images, prompt, "cpu", template)
    assert words in str(error.value)


def test_templates_fill_in():
    assert _filled("U: {images:<i>\n}{prompt} A:", 2, "what {is} it?") == "U: <i>\n<i>\nwhat {is} it? A:"
    assert _filled("<i>{prompt}", 1, "x") == "<i>x"
    assert models.template(entry("instructblip_7b")) == "{prompt}" and models.template(entry("llava15_7b")) is None
    assert models.template(entry("llava15_7b", template="{prompt}!", weights="random")) == "{prompt}!"


def test_the_first_token_is_not_doubled(llava, monkeypatch):
    """Chat templates of some models begin with the token that their tokenizer puts before every text."""
    given = []
    monkeypatch.setattr(
        type(llava),
        "__call__",
        lambda self, **options: (
            given.append(options.get("add_special_tokens")) or llava.tokenizer("a", return_tensors="pt")
        ),
    )
    for template in ("<s>{prompt}", "{prompt}"):
        models.encode(llava, [picture(40, 30)], "a", "cpu", template)
    assert given == [False, None]


@pytest.mark.parametrize("bits, layer", [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_quantized(bits, layer):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model, _ = models.load(entry("scenes", quantization=bits, dtype="bfloat16"))
    found = [m for m in model.modules() if type(m).__name__ == layer]
    assert found
    if bits == "4bit":
        assert {(m.weight.quant_type, m.compute_dtype) for m in found} == {("nf4", torch.bfloat16)}


def test_device_map():
    pytest.importorskip("accelerate")
    model, processor = models.load(entry("scenes", device_map="auto"))
    inputs = models.encode(processor, [picture(64, 64)], "Please describe this image in detail.", model.device)
    assert (
        Stack([]).generate(model, **inputs, max_new_tokens=2, do_sample=False).shape[1]
        == inputs["input_ids"].shape[1] + 2
    )


def test_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    if (least := Version(MIN_PEFT_VERSION)) > Version(peft.__version__):
        pytest.skip(f"transformers {transformers.__version__} wants peft {least}")
    model, _ = models.load(models.entry("scenes"))
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = models.load(entry("scenes", adapter=str(tmp_path / "adapter")))
    weights = {n: p for n, p in loaded.named_parameters() if "lora" in n}
    assert weights and all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in weights.items())
    with pytest.raises(InputError, match="could not load the adapter"):
        models.load(entry("scenes", adapter=str(tmp_path)))


@pytest.mark.parametrize("family", [name for name in families.NAMES if families.FAMILIES[name].images])
def test_a_saved_copy_of_every_family_loads_by_its_folder(family, tmp_path):
    """`model=auto model.path=FOLDER` with what `save_pretrained` writes says what the model in memory says."""
    families.model(family).save_pretrained(tmp_path)
    families.processor(family).save_pretrained(tmp_path)
    entry = models.entry("auto")
    entry.update(
        {
            "path": str(tmp_path),
            "dtype": "float32",
            "device": "cpu",
            "template": f"w30 {{images:{families.FAMILIES[family].placeholder}}} {{prompt}}",
        }
    )
    if family == "instructblip":
        entry.template = "w30 {prompt}"
    model, processor = models.load(entry)
    assert (
        type(model) is type(families.model(family))
        and type(processor).__name__ == type(families.processor(family)).__name__
    )
    inputs = models.encode(
        processor,
        [families.picture(1), families.picture(2, 32, 48)],
        ["w40 w41", "w42 w43 w44 w45"],
        "cpu",
        models.template(entry),
    )
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    stack = Stack([PruneHal(r=0.6)])
    ids = stack.generate(model, **inputs, **options)
    assert torch.equal(ids, Stack([PruneHal(r=0.6)]).generate(families.model(family), **inputs, **options))
    assert all(row["prunes"] for row in stack.record["prunehal"])


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_older_checkpoints_keep_the_class_of_their_processor_with_the_image_processor(family, tmp_path):
    """As Qwen2-VL's: no processor_config.json; the rest of the options are the class's defaults."""
    families.processor(family).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(whole["image_processor"] | {"processor_class": whole["processor_class"]})
    )
    loaded = processors.load(str(tmp_path))
    assert type(loaded).__name__ == type(families.processor(family)).__name__
    assert loaded.image_processor.to_dict() == families.processor(family).image_processor.to_dict()


@pytest.mark.parametrize("quantization, gib", [(None, 13.2), ("8bit", 6.8), ("4bit", 3.7)])
def test_a_dry_run_counts_the_bytes_of_quantized_weights(quantization, gib):
    found = dry_run.sheet(entry("llava15_7b", quantization=quantization), picture(), 16)
    assert found.weights / 2**30 == pytest.approx(gib, abs=0.15) and found.visual == 576
