"""DeCo against the rule written out for one row at a time."""

import pytest
import tiny
import torch

from baselines import DeCo
from decoders import Stack, StackError

OPTIONS = dict(
    max_new_tokens=12,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
)


def _by_hand(model, hidden, final, alpha, top_p, top_k):
    """Scores of one row: `hidden` are its early hidden states, `final` its logits."""
    p = final.softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda y: -p[y])[:top_k]
    likely, total = [], 0.0
    for y in order:
        likely.append(y)
        total += p[y]
        if total >= top_p:
            break
    early = [model.get_output_embeddings()(model.get_decoder().norm(h)) for h in hidden]
    sure, z = max(((float(z.softmax(-1)[y]), i) for i, z in enumerate(early) for y in likely), key=lambda x: x[0])
    out = torch.full_like(final, -torch.inf)
    out[likely] = final[likely] + alpha * sure * early[z][likely]
    return out


@pytest.mark.parametrize(
    "options", [dict(), dict(alpha=1.3, top_p=0.6, top_k=5), dict(top_p=1, top_k=None), dict(alpha=0)], ids=str
)
@pytest.mark.parametrize("family", ["llava", "qwen25vl", "instructblip"])
@torch.no_grad()
def test_equals_the_rule_written_out(family, options):
    deco = DeCo(**options, layers=[1, 2])
    inputs, model = tiny.inputs(family, 2), tiny.model(family)
    plain = Stack([]).generate(model, **inputs, **OPTIONS | dict(max_new_tokens=1), output_hidden_states=True)
    out = Stack([deco]).generate(model, **inputs, **OPTIONS)
    for row in range(2):
        hidden = [plain.hidden_states[0][k][row, -1] for k in (1, 2)]
        expected = _by_hand(model, hidden, plain.logits[0][row], deco.alpha, deco.top_p, deco.top_k or tiny.VOCAB)
        torch.testing.assert_close(out.scores[0][row], expected, atol=1e-3, rtol=1e-4)
    assert (torch.stack(out.scores) > -torch.inf).any(-1).all()


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_setting_changes_nothing(family, options):
    inputs = tiny.inputs(family, 2)
    plain = Stack([]).generate(tiny.model(family), **inputs, **OPTIONS | options)
    for layers in (None, [1]):
        out = Stack([DeCo(alpha=0, top_p=1, top_k=None, layers=layers)]).generate(
            tiny.model(family), **inputs, **OPTIONS | options
        )
        assert torch.equal(out.sequences, plain.sequences)


def test_impossible_tokens_are_no_candidates():
    scores = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf], [0.0, 3.0, -torch.inf, 2.9]])
    early = torch.tensor([[[0.0, 9.0, 1.0, 0.0], [0.0, 1.0, 9.0, 0.0]]])  # sure of impossible tokens
    out = DeCo(alpha=1, top_p=1, top_k=4).process_logits(type("Step", (), {"early_logits": early}), None, scores)
    p = early[0].softmax(-1)
    sure = torch.stack([p[0, 2], p[1, 1]])[:, None]
    torch.testing.assert_close(out, (scores + sure * early[0]).masked_fill(scores == -torch.inf, -torch.inf))


def test_a_model_without_final_norm_is_refused():
    model, decoder = tiny.model("llava"), tiny.model("llava").get_decoder()
    norm = decoder.norm
    try:
        decoder.norm = None
        assert "no final norm" in Stack([DeCo()]).refusals(model)["deco"]
        with pytest.raises(StackError, match="no final norm"):
            Stack([DeCo()]).generate(model, **tiny.inputs("llava"))
        assert Stack([DeCo(alpha=0)]).refusals(model) == {"deco": None}
    finally:
        decoder.norm = norm


def test_layers_are_the_same_fractions_of_depth():
    class Model:
        def __init__(self, count):
            text = type("T", (), {"num_hidden_layers": count})()
            self.config = type("C", (), {"get_text_config": lambda self, decoder: text})()

    assert DeCo()._read(Model(32)) == tuple(range(20, 29))
    assert DeCo()._read(Model(40)) == tuple(range(25, 36))
    assert DeCo()._read(Model(3)) == (2,) and DeCo()._read(Model(1)) == (0,)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha=-1), ">= 0"),
        (dict(top_p=0), "in \\(0, 1\\]"),
        (dict(top_k=0), ">= 1"),
        (dict(layers=[]), "list"),
        (dict(top_k=True), ">= 1"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        DeCo(**bad)


def test_a_layer_beyond_the_model_is_refused():
    with pytest.raises(StackError, match="0 to 3"):
        Stack([DeCo(layers=[7])]).generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=2)
