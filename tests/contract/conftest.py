"""A tiny causal LM and prompts for the hosts' tests."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # GMPO's trainer lives there, and says so at its import

import pytest
from datasets import Dataset

from bandpo.toy.models import WarmUp, build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer, tmp_path):
    def make(seed=0):
        return build_model(WarmUp(hidden_size=32, layers=1, seed=seed), tokenizer)

    return make


@pytest.fixture(scope="session")
def prompts():
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 9) for b in range(1, 9)])
