"""The seam to transformers: nothing goes past it, and what is missing or untested is named."""

import ast
import logging
from pathlib import Path

import pytest
from packaging.version import Version

from decoders import StackError, hf, versions

SEAM = Path(hf.__file__).parent
ROOT = SEAM.parent.parent
FILES = sorted(p for folder in ("decoders", "prunehal", "baselines") for p in (ROOT / folder).rglob("*.py"))

# names of transformers that are private or internal, or that versions spell differently: as attribute, argument or key
NAMES = {
    *("past_key_values", "cache_params", "mm_encoder_outputs", "pooler_output", "deepstack_features"),
    *("prepare_inputs_for_generation", "next_sequence_length", "logits_to_keep"),
    *("mm_token_type_ids", "token_type_ids"),
    *("get_text_config", "layer_types", "attention_chunk_size", "num_hidden_layers", "num_kv_shared_layers"),
    *("final_logit_softcapping", "cross_attention_layers", "tie_word_embeddings"),
    *("get_decoder", "get_output_embeddings", "get_input_embeddings", "language_model", "lm_head"),
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("lazy_initialization", "is_initialized", "offloading", "conv_states", "recurrent_states", "number_of_states"),
    *("get_generation_mode", "eos_token_tensor", "pad_token_tensor"),
}


def passing(tree: ast.AST) -> list[str]:
    """What a module imports or names of transformers."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "transformers"]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module] if node.module.split(".")[0] == "transformers" else []
        elif isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if of in ("self", "cls") or (of == "hf" and not private):
                continue
            if node.attr in NAMES or (private and node.attr not in own | ALLOWED):
                found.append(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in NAMES:
            found.append(node.arg)
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            found.append(node.value)
    return found


# private names of ours that other modules of ours use, and of torch: a tensor's version counter, its compiler, and its
# copy of many tensors at once
ALLOWED = {"_version", "_weights", "_dynamo", "_inductor", "_foreach_copy_"}


# some of what each module of the seam is known to touch
KNOWN = {
    "__init__": {"transformers.cache_utils"},
    "attention": {"_attn_implementation", "number_of_states"},
    "generation": {"_prefill", "_eos_token_tensor"},
    "inputs": {"mm_token_type_ids", "pooler_output"},
    "models": {"num_hidden_layers", "get_decoder"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_only_the_seam_touches_transformers(file):
    found = passing(ast.parse(file.read_text()))
    if file.parent == SEAM:
        assert KNOWN[file.stem] <= set(found)
    elif file == ROOT / "decoders" / "versions.py":  # which names symbols in words, and imports none
        assert found == ["transformers"]
    else:
        assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import transformers.cache_utils",
        "from transformers import Cache",
        "def f(model):\n    from transformers.utils import logging",
        "model._prefill(ids)",
        "config._attn_implementation = 'eager'",
        "kwargs['past_key_values']",
        "model(past_key_values=cache)",
        "out.past_key_values",
        "getattr(config, 'layer_types')",
        "model.get_decoder().layers",
        "hf.text_config(model).layer_types",
        "hf._PER_TOKEN",
    ],
)
def test_a_use_past_the_seam_is_found(code):
    assert passing(ast.parse(code))


def test_a_missing_symbol_is_named():
    with pytest.raises(StackError, match=r"no transformers\.cache_utils\.Cache\.get_seq_lengths, .* adapt decoders/hf"):
        versions.check_symbols({"transformers.cache_utils": ("Cache.get_seq_length", "Cache.get_seq_lengths")})
    with pytest.raises(StackError, match=r"has no transformers\.cache_tools\.Cache"):
        versions.check_symbols({"transformers.cache_tools": ("Cache",)})


def test_an_older_version_is_refused_and_a_newer_one_runs_with_a_warning(caplog):
    with pytest.raises(StackError, match=rf"transformers 5\.16\.1 is too old.* {versions.OLDEST} to"):
        versions.check_version(Version("5.16.1"))
    with caplog.at_level(logging.WARNING, "decoders"):
        versions.check_version(Version(versions.OLDEST))
        versions.check_version(Version(versions.NEWEST))
        assert not caplog.records
        versions.check_version(Version("99.0"))
    (record,) = caplog.records
    assert (
        f"transformers 99.0 is newer than any version tested ({versions.OLDEST} to {versions.NEWEST})"
        in record.getMessage()
    )
