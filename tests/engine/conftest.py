"""A tiny hybrid with the embedded tokenizer, as one checkpoint folder."""

import pytest

from model.shapes import tiny_model
from sala.data import load_tokenizer
from sala.model.checkpoint import find_checkpoint


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(find_checkpoint("embedded-teacher"))


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
