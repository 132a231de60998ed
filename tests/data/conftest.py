"""The embedded tokenizer, its words, and a little text."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sala.data import Document, Vocabulary, encode_documents, load_tokenizer, vocabulary

EMBEDDED_TEACHER = Path(str(resources.files("sala"))) / "embedded" / "teacher"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(EMBEDDED_TEACHER)


@pytest.fixture(scope="session")
def words(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return vocabulary(tokenizer)


@pytest.fixture(scope="session")
def text(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    lines = "\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(200))
    return encode_documents(tokenizer, [Document("lines.py", lines)])
