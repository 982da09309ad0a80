"""Shared by all tests: repeatable, offline, and few threads, since the models are tiny."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
