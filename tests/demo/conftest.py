"""A tiny random teacher with the embedded tokenizer, and one small demo on it that the tests share."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from small_plan import PLAN

from sala.data import Document, load_tokenizer
from sala.demo import Moment, run_demo
from sala.demo import measure as demo_measure
from sala.eval import scores
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.train import batches

DOCUMENTS = [Document(f"{name}.py", f"{name} = [{name}, 1]\nprint({name})\n" * 40) for name in ("one", "two", "three")]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of four layers."""
    tokenizer = load_tokenizer(Path(str(resources.files("sala"))) / "embedded" / "teacher")
    torch.manual_seed(0)
    config = MiniCPMSALAConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_use_rope=True,
        attn_use_output_gate=False,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
    )
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    MiniCPMSALAForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def few_documents() -> Any:
    """The standard library is three short documents, so that encoding it takes no seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (demo_measure, scores, batches):
            patch.setattr(module, "library_documents", lambda split: DOCUMENTS)
        yield


@pytest.fixture(scope="session")
def demo(
    teacher: Path, few_documents: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, list[Moment]]:
    """A finished demo: its folder, its results, and everything it told."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "report"
    moments: list[Moment] = []
    results = run_demo(out, teacher=teacher, plan=PLAN, observer=moments.append)
    return out, results, moments
