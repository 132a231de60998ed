"""SmolLM2-135M-Instruct, as `sala fetch` brings it, is the model that transformers reads from the same file."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sala.data import load_tokenizer
from sala.model.families import load_model
from sala.model.fetch import FETCHABLE
from sala.model.report import inspect
from tolerances import assert_close

NAME = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
TEXT = "In 1789 the people of Paris stormed the Bastille.  It's told that\n\n\tthe king wrote 'rien' into his diary."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

pytestmark = pytest.mark.real


def theirs(dtype):
    file = FETCHABLE[NAME].place
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()


def test_logits_equal_those_of_transformers():
    ids = torch.tensor([load_tokenizer(FETCHABLE[NAME].place)(TEXT).input_ids])
    with torch.no_grad():
        assert_close(load_model(NAME, dtype=torch.float32)(ids).logits, theirs(torch.float32)(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greedy_answer_is_that_of_transformers(dtype, sala):
    file = FETCHABLE[NAME].place
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    # transformers does not take the id that ends an answer from the file, and 5.17 reads another for its tokenizer
    answer = theirs(DTYPES[dtype]).generate(
        **prompt, do_sample=False, max_new_tokens=32, eos_token_id=load_tokenizer(file).eos_token_id
    )
    expected = tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    done = sala("generate", "--model", NAME, "--chat", "--prompt", QUESTION, "--dtype", dtype, "--max-new-tokens", 32)
    assert (done.code, done.out.rstrip("\n")) == (0, expected), done.err
    assert "Paris" in expected


def test_its_dtype_is_bfloat16(sala):
    assert inspect(NAME).dtype == "bfloat16"
    assert load_model(NAME).dtype == torch.bfloat16
    assert "134,515,008 parameters, bfloat16" in sala("inspect", NAME).out
