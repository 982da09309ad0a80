"""Whether decoders act: a property that holds because nothing happened proves nothing."""

from __future__ import annotations

import functools

import torch

from decoders import Decoder


def _changes(hook: str, args: tuple, out) -> set[str]:
    """What a hook's answer changed, as names: of the hook, and `rollback` where rows went back."""
    if hook == "rescore_candidates":
        scores, target = out
        went = target is not None and bool((target >= 0).any())
        return ({hook} if not torch.equal(scores, args[-1]) else set()) | ({"rollback"} if went else set())
    if out is None:
        return set()
    if hook == "process_logits":
        possible = torch.isfinite(out)  # to make others impossible is not enough
        return set() if torch.equal(out[possible], args[-1][possible]) else {hook}
    return {hook} if bool((out != 0).any() if hook == "attention_bias" else not out.all()) else set()


def _hidden(view) -> int:
    """Slots that are hidden so far in a forward."""
    known = view._inside.hidden.get(view.branch)
    return 0 if known is None else int(known.sum())


def watched(decoder: Decoder) -> tuple[Decoder, set[str]]:
    """The decoder, and a set that is filled, while it runs, with the names of its hooks that changed something.

    Only hooks that its class overrides are looked at, by a class made for it, so that the loop sees no difference.
    """
    base, acted = type(decoder), set()

    def looked_at(hook):
        @functools.wraps(getattr(base, hook))
        def call(self, *args):
            hidden = _hidden(args[-1]) if hook == "edit_attention" else None
            out = getattr(base, hook)(self, *args)
            if hook == "edit_attention" and args[-1].in_prompt and _hidden(args[-1]) > hidden:
                acted.add(hook)
            if not hook.startswith("edit_"):
                acted.update(_changes(hook, args, out))
            elif args[-1].in_prompt and out is not None and not torch.equal(out, args[-2]):  # later it may be compiled
                acted.add(hook)
            return out

        return call

    hooks = (
        *("process_logits", "rescore_candidates", "select_slots", "select_slots_after_prefill", "attention_bias"),
        *("edit_attention", "edit_mlp", "edit_hidden_states"),
    )
    own = {hook: looked_at(hook) for hook in hooks if getattr(base, hook) is not getattr(Decoder, hook)}
    decoder.__class__ = type(base.__name__, (base,), own)
    return decoder, acted


def all_watched(decoders) -> tuple[list[Decoder], list[set[str]]]:
    """The same for several: the decoders, and what each of them changed."""
    pairs = [watched(decoder) for decoder in decoders]
    return [decoder for decoder, _ in pairs], [acted for _, acted in pairs]
