"""Tests run tiny models: one thread is faster than two, and sums are the same everywhere."""

import os

import pytest
import torch
from support.language_model import needs_smollm2  # noqa: F401  a fixture for all tests

torch.set_num_threads(1)
# For the processes that tests start: with two cores and two processes, more threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory):
    """What the evaluation harnesses read goes through a cache of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
