"""What must hold on any device: `python -m experiments.bench.gpu` runs this file there, the suite on the CPU does not.

DEVICE and DTYPE choose where and how the tiny models run, COMPILE=on that steps are compiled, COMPILE=captured that
they are captured as CUDA graphs. In float32 a run on the device is held against the same run on the CPU, as it is; in
half precision, whose last bits depend on kernels, against transformers' own on the same device, and every decoder must
act.
"""

import copy
import functools
import os

import pytest
import stacks
import tiny
import torch

from decoders import Stack

DEVICE, DTYPE = os.environ.get("DEVICE", "cpu"), getattr(torch, os.environ.get("DTYPE", "float32"))
COMPILE = os.environ.get("COMPILE", "off")
FAMILIES = ("llava", "qwen25vl", "internvl")
STACKS = (
    *((name,) for name in stacks.METHODS),
    ("opera", "prunehal"),
    ("vcd", "prunehal"),
    ("prunehal", "opera", "vcd", "dola", "deco"),
    ("fastv", "sid", "pai", "vista", "prunehal"),
)
# float32 as the CPU computes it
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@functools.cache
def model(family: str, device: str = DEVICE, dtype: torch.dtype = DTYPE):
    return copy.deepcopy(tiny.model(family)).to(device, dtype)


def generate(
    family: str,
    names: tuple[str, ...] | None,
    search: str,
    device: str = DEVICE,
    dtype: torch.dtype = DTYPE,
    compile: str = COMPILE,
):
    """What a stack generates of two images, on the CPU afterwards; transformers' own `generate` for None."""
    given = tiny.inputs(family, 2, seed=3)
    given = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in given.items()}
    given |= dict(max_new_tokens=12, do_sample=False, eos_token_id=stacks.EOS, pad_token_id=0)
    given |= dict(return_dict_in_generate=True, output_scores=True, output_logits=True) | stacks.SEARCHES[search]
    torch.manual_seed(0)
    net = model(family, device, dtype)
    if names is None:
        return net.generate(**given), {}
    stack = Stack([stacks.make(name, family) for name in names], compile=compile)
    out = stack.generate(net, **given)
    assert (stack.compiled is not None) == (stack.compile != "off")
    return out, stack.record


@functools.cache
def plain(family: str, search: str):
    return generate(family, (), search)[0]


def assert_same(got, expected, tolerance: float) -> None:
    """Equal tokens, but where two were as good as equal; scores of beams, whose order such a pair may change."""
    if "sequences_scores" in expected:
        torch.testing.assert_close(
            got.sequences_scores.float().cpu(), expected.sequences_scores.float().cpu(), rtol=tolerance, atol=tolerance
        )
        return
    alike = torch.ones(len(got.sequences), dtype=torch.bool)
    start = got.sequences.shape[1] - len(got.scores)
    for step, (mine, theirs) in enumerate(zip(got.scores, expected.scores, strict=False)):
        mine, theirs = mine[alike.to(mine.device)].float().cpu(), theirs[alike.to(theirs.device)].float().cpu()
        size = theirs[theirs.isfinite()].abs().max()
        both = mine.isfinite() & theirs.isfinite()
        assert (mine - theirs)[both].abs().max() <= tolerance * size, f"step {step}"
        ranked = theirs.topk(2).values
        if not ranked.isfinite().all():  # top_k=1 leaves one: what it chose from are the logits
            ranked = expected.logits[step][alike.to(expected.logits[step].device)].float().cpu().topk(2).values
        tied = (ranked[:, 0] - ranked[:, 1]) <= 2 * tolerance * size
        tokens = [x.sequences[:, start + step].cpu() for x in (got, expected)]
        same = (tokens[0] == tokens[1])[alike]
        assert (same | tied).all(), f"step {step}"
        alike[alike.clone()] = same
        if not alike.any():
            return


@pytest.mark.parametrize("search", stacks.SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_stack_equals_transformers_generate(family, search):
    assert_same(plain(family, search), generate(family, None, search)[0], 1e-4 if DTYPE == torch.float32 else 0.05)


@pytest.mark.parametrize("search", stacks.SEARCHES)
@pytest.mark.parametrize("names", STACKS, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_acts_and_equals_itself_on_the_cpu(family, names, search):
    out, record = generate(family, names, search)
    assert out.sequences.device.type == torch.device(DEVICE).type
    acted(family, names, search, out, record)
    if DTYPE == torch.float32 and (DEVICE, COMPILE) != ("cpu", "off"):
        expected, theirs = generate(family, names, search, "cpu", torch.float32, "off")
        assert_same(out, expected, 1e-3)
        if "prunehal" in names and search != "beam" and torch.equal(out.sequences.cpu(), expected.sequences):
            kept = [[[p["kept"] for p in row["prunes"]] for row in r["prunehal"]] for r in (record, theirs)]
            assert kept[0] == kept[1]
    else:
        assert all(torch.isfinite(scores.amax(-1)).all() for scores in out.scores)


def acted(family, names, search, out, record) -> None:
    """Scores or logits are not those of the empty stack, and what tells of events tells of some."""
    empty = plain(family, search)
    steps = list(zip(out.scores, empty.scores, strict=False))
    assert out.sequences.shape != empty.sequences.shape or any(not torch.equal(a, b) for a, b in steps)
    if "prunehal" in names:
        assert any(row["prunes"] for row in record["prunehal"])
    if "opera" in names and search != "beam":
        assert any(row["rollbacks"] for row in record["restless"])
