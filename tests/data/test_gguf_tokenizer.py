"""The tokenizer of a GGUF file encodes as the one that the file was written from."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from sala.data import load_tokenizer
from sala.data.gguf_tokenizer import SPLITS
from sala.errors import CheckpointError

TEXTS = [
    "It's 1945, and they'll read 3,141,592 words; isn't it?",
    "def f(x):\n\treturn x  +   1\n\n\n# ende\r\n",
    " leading and trailing  ",
    "Größe, naïve café, e\u0301, 東京は2024年, Привет, नमस्ते ١٢٣",
    "🙂🇫🇷 ok\u00a0no-break\u200bzero",
    "HTTPServer camelCase snake_case SCREAMING",
    "",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CONTROLS, SPOKEN = ("<|im_start|>", "<|im_end|>"), "<think>"


def byte_level(*steps, regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


def of_tiktoken() -> str:
    """Llama 3's pattern of words, which transformers takes for any tiktoken file."""
    return inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default


# how text is split, as transformers or the model's own tokenizer.json has it
SPLITTERS = {
    "gpt-2": byte_level(regex=True),
    "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "llama-bpe": byte_level(pre_tokenizers.Split(Regex(of_tiktoken()), "isolated")),
    "qwen2": Qwen2Tokenizer()._tokenizer.pre_tokenizer,
    "deepseek-r1-qwen": Qwen2Tokenizer()._tokenizer.pre_tokenizer,
}
COMPOSED = ("qwen2", "deepseek-r1-qwen")


def trained(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITTERS[pre], decoders.ByteLevel()
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in CONTROLS])
    tokenizer.add_tokens([AddedToken(SPOKEN, normalized=False)])
    return tokenizer


def keys_of(model: str, tokens: list[str], merges: list[str] | None) -> dict[str, Any]:
    types = [3 if word in (*CONTROLS, "<s>", "</s>") else 4 if word == SPOKEN else 1 for word in tokens]
    types = [6 if word.startswith("<0x") else kind for word, kind in zip(tokens, types, strict=True)]
    keys = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return keys if merges is None else {**keys, "tokenizer.ggml.merges": merges}


def tokenizer_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer, but for the way it splits text."""
    vocabulary, state = tokenizer.get_vocab(), json.loads(tokenizer.to_str())
    added = {token["id"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    keys = keys_of(
        "gpt2", sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in state["model"]["merges"]]
    )
    types = [added.get(number, 1) for number in range(len(vocabulary))]
    return {**keys, "tokenizer.ggml.token_type": types}


def write(path: Path, model: str, tokens: list[str], merges: list[str] | None, **keys) -> Path:
    return save(path, keys_of(model, tokens, merges), **keys)


def save(path: Path, rows: dict[str, Any], **keys) -> Path:
    writer = GGUFWriter(path, "llama")
    named = {key if key == "chat_template" else f"ggml.{key}": value for key, value in keys.items()}
    for key, value in {**rows, **{f"tokenizer.{key}": value for key, value in named.items()}}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(path: Path, tokenizer: Tokenizer, **keys) -> Path:
    return save(path, tokenizer_keys(tokenizer), **keys)


@pytest.mark.parametrize("pre", SPLITTERS)
def test_ids_are_those_of_the_tokenizer_that_was_written(pre, tmp_path):
    original = trained(pre)
    ours = load_tokenizer(written(tmp_path / "x.gguf", original, pre=pre, add_bos_token=False))
    for text in (*TEXTS, "<|im_start|>user\nhi <think>7</think><|im_end|>"):
        assert ours(text).input_ids == original.encode(text).ids, text
        assert ours.decode(ours(text).input_ids) == original.decode(original.encode(text).ids, False)


def test_patterns_of_words_are_those_of_transformers():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping", reason="newer transformers")
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    assert {name for name, split in SPLITS.items() if split.words is not None} <= theirs.keys()
    assert {name: SPLITS[name].words for name in SPLITS.keys() & theirs.keys()} == {
        name: theirs[name] for name in SPLITS.keys() & theirs.keys()
    }


def test_a_word_that_is_a_token_is_one_where_the_model_was_made_so(tmp_path):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "abc"]
    keys = {"add_bos_token": False}
    whole = load_tokenizer(write(tmp_path / "a.gguf", "gpt2", tokens, ["a b"][:0], pre="llama-bpe", **keys))
    merged = load_tokenizer(write(tmp_path / "b.gguf", "gpt2", tokens, ["a b"][:0], pre="qwen2", **keys))
    assert len(whole("abc").input_ids) == 1 and len(merged("abc").input_ids) == 3


def test_special_tokens_and_the_chat_template_are_kept(tmp_path):
    original = trained("smollm")
    begin, end = (original.token_to_id(word) for word in CONTROLS)
    keys = {"bos_token_id": begin, "eos_token_id": end, "padding_token_id": end, "chat_template": TEMPLATE}
    file = written(tmp_path / "x.gguf", original, pre="smollm", add_bos_token=True, **keys)
    ours = load_tokenizer(file)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (begin, end, end)
    assert ours("hi").input_ids == [begin, *original.encode("hi").ids]
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert ours.decode([begin, *original.encode("<think>hi").ids, end], skip_special_tokens=True) == "<think>hi"
    assert ours.name_or_path == str(file)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    file = written(tmp_path / "x.gguf", trained("qwen2"), pre="qwen2", bos_token_id=0, chat_template=TEMPLATE)
    ours = load_tokenizer(file)
    ours.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again(TEXTS).input_ids == ours(TEXTS).input_ids and again.chat_template == TEMPLATE


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "▁",
    "t",
    "h",
    "e",
    "r",
    "a",
    "th",
    "the",
    "▁the",
    "▁a",
    "er",
    "▁t",
    "▁ther",
    "1",
    "9",
    "<",
    "/",
    "</",
    "s",
    ">",
    "s>",
]
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))]


def sentencepiece(path: Path, **keys):
    return write(path, "llama", SENTENCEPIECE, None, scores=SCORES, bos_token_id=1, eos_token_id=2, **keys)


@pytest.mark.parametrize("text", ["the terah 1999", "a\nb  the", "日本 the 🙂", "the"])
def test_a_sentencepiece_vocabulary_is_merged_by_its_scores(text, tmp_path):
    vocabulary = {token: number for number, token in enumerate(SENTENCEPIECE)}
    merges = generate_merges(vocabulary, dict(zip(SENTENCEPIECE, SCORES, strict=True)), ("<s>", "</s>"))
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges)
    ours = load_tokenizer(sentencepiece(tmp_path / "x.gguf"))
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours(text).input_ids == [1, *ids]
    assert ours.decode(ids) == text


def test_a_control_token_spelled_out_is_no_merge(tmp_path):
    ours = load_tokenizer(sentencepiece(tmp_path / "x.gguf"))
    assert ours("the</s>").input_ids[-1] == 2
    assert 2 not in ours("the</s>", split_special_tokens=True).input_ids


def test_of_a_sentencepiece_vocabulary_a_space_goes_first_unless_the_file_says_no(tmp_path):
    words = load_tokenizer(sentencepiece(tmp_path / "a.gguf")).tokenize("the")
    bare = load_tokenizer(sentencepiece(tmp_path / "b.gguf", add_space_prefix=False)).tokenize("the")
    assert (words, bare) == (["▁the"], ["the"])


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("gpt2", {"pre": "falcon"}, "tokenizer.ggml.pre = 'falcon' in .*; expected one of gpt-2, smollm"),
        ("gpt2", {}, "tokenizer.ggml.pre = None"),
        ("bert", {}, "tokenizer.ggml.model = 'bert' in .*; expected 'gpt2' or 'llama'"),
        ("gpt2", {"pre": "qwen2", "bos_token_id": 9999}, "names token 9999 and has 280; expected a whole vocabulary"),
        ("llama", {}, "neither tokenizer.ggml.merges nor tokenizer.ggml.scores"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(model, keys, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write(tmp_path / "x.gguf", model, SENTENCEPIECE, None, **keys))
