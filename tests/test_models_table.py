"""`docs/models.md` says what the configs and the code say."""

from pathlib import Path

import models_table
import pytest
import transformers

DOC = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()


@pytest.mark.skipif(
    f"transformers {transformers.__version__};" not in DOC,
    reason="docs/models.md was written with another transformers",
)
def test_the_table_of_models_is_up_to_date():
    assert models_table.HEAD in DOC
    assert models_table.figures() in DOC, "run: python tests/models_table.py"
