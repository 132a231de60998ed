"""The tokenizer that a GGUF file describes: llama.cpp stores the vocabulary, and names how text is split before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from sala.errors import CheckpointError
from sala.model.gguf import GGUFFile

# `tokenizer.ggml.token_type` of a token
CONTROL, USER_DEFINED = 3, 4
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
SPACE = "▁"

LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Split:
    """How a tokenizer cuts text into words before it merges bytes.

    words: a pattern of words; None: GPT-2's own.
    digits: every digit is a word.
    whole_words: a word that is a token is one, whatever its merges say.
    begins: the start token comes first where the file does not say.
    composed: text is brought into Unicode's composed form first.
    """

    words: str | None = None
    digits: bool = False
    whole_words: bool = False
    begins: bool = False
    composed: bool = False


LLAMA3 = Split(LLAMA3_WORDS, whole_words=True, begins=True)
QWEN2 = Split(QWEN_WORDS, composed=True)
# by `tokenizer.ggml.pre`, as llama.cpp's converter writes it
SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": Split(TEKKEN_WORDS, whole_words=True, begins=True),
}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file, with its chat template.

    Raises:
        CheckpointError: the file is damaged, or its tokenizer is of a kind that is not known.
    """
    file = GGUFFile(path)
    kind, tokens = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.tokens")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE) or not tokens:
        raise CheckpointError(
            f"tokenizer.ggml.model = {kind!r} in {path}; expected {BYTE_LEVEL!r} or {SENTENCEPIECE!r}, with its tokens"
        )
    tokenizer, begins = (_byte_level if kind == BYTE_LEVEL else _sentencepiece)(file, tokens)
    types = file.get("tokenizer.ggml.token_type", [])
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, types, strict=False) if its == wanted]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    special_tokens = {
        f"{name}_token": _token(file, tokens, number)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := file.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    _surround(
        tokenizer,
        special_tokens.get("bos_token") if file.get("tokenizer.ggml.add_bos_token", begins) else None,
        special_tokens.get("eos_token") if file.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=str(path),
        chat_template=file.get("tokenizer.chat_template"),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Return a tokenizer that merges bytes, and whether the start token comes first by default."""
    name = file.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise CheckpointError(f"tokenizer.ggml.pre = {name!r} in {file.path}; expected one of {', '.join(SPLITS)}")
    split = SPLITS[name]
    merges = _pairs(file.get("tokenizer.ggml.merges", []))
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, ignore_merges=split.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.words is not None:
        steps.append(pre_tokenizers.Split(Regex(split.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, split.begins


def _sentencepiece(file: GGUFFile, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """Return a tokenizer that merges characters with spaces among them, bytes where it has no character."""
    vocabulary = _numbered(tokens)
    if (written := file.get("tokenizer.ggml.merges")) is not None:
        merges = _pairs(written)
    else:
        scores = file.get("tokenizer.ggml.scores")
        if not scores:
            raise CheckpointError(f"{file.path} has neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
        types = file.get("tokenizer.ggml.token_type", [])
        # spelled out in a text, a control token is no word
        control = {token for token, its in zip(tokens, types, strict=False) if its == CONTROL}
        merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)), control)
    unknown = _token(file, tokens, file.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces, plain = normalizers.Replace(" ", SPACE), decoders.Replace(SPACE, " ")
    pieces: list[Any] = [plain, decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        pieces.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer, True


def _token(file: GGUFFile, tokens: Sequence[str], number: int) -> str:
    if number >= len(tokens):
        raise CheckpointError(f"{file.path} names token {number} and has {len(tokens)}; expected a whole vocabulary")
    return tokens[number]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    # a first part may itself begin with a space
    cuts = [(merge, merge.index(" ", 1)) for merge in merges]
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]


def _surround(tokenizer: Tokenizer, begin: str | None, end: str | None) -> None:
    before, after = [begin] if begin else [], [end] if end else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*before, *after)],
        )
