"""Any stack under lmms-eval: `python -m lmms_eval --model prunehal --model_args 'model=NAME,decoder=[a,b]' --tasks
...`; see docs/lmms-eval.md.

lmms-eval loads this file whatever model it runs, so that the rest is imported by name only.
"""


def manifest():
    """What the entry point `lmms_eval.models` gives: where lmms-eval finds the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("prunehal", f"{__name__}.adapter.Simple", f"{__name__}.adapter.Chat")
