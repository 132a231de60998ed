"""A saved document answers as the text read anew; another reader's, a damaged and a half-written one are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sala.engine import Sampling, encode_prompt, generate, join, load, open_checkpoint
from sala.engine.runner import Extension, Runner
from sala.engine.saved import (
    FORMAT,
    gather,
    load_document,
    open_cache,
    read_document,
    reader_of,
    save_document,
    saved_text,
    scatter,
)
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM

TEXT = "".join(f"[set] @amber @birch @cedar @delta\n# note {n}\n" for n in range(40))
QUESTION = "[get] @amber @birch"


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("embedded-hybrid")


@pytest.fixture(scope="module")
def network(checkpoint):
    return load(checkpoint, 1000, 512)


@pytest.fixture(scope="module")
def reader(network, checkpoint):
    return reader_of(network, checkpoint.tokenizer)


@pytest.fixture(scope="module")
def encode(checkpoint):
    return lambda text: encode_prompt(checkpoint.tokenizer, text, checkpoint.config.vocab_size)


@pytest.fixture(scope="module")
def saved(network, reader, encode, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "book.sala"
    save_document(path, read_document(network, TEXT, encode, chunk=100), reader)
    return path


def test_a_saved_document_answers_as_the_text_read_anew(network, checkpoint, encode, saved):
    prompt = encode(join(saved_text(saved), QUESTION))
    assert saved_text(saved) == TEXT
    cache = open_cache(saved, network, checkpoint.tokenizer, prompt, len(prompt) + 8)
    assert len(prompt) - 100 < cache.get_seq_length() < len(prompt)
    sampling = Sampling(max_new_tokens=8)
    found = generate(network, checkpoint.tokenizer, prompt, sampling, cache=cache)
    assert found.tokens == generate(network, checkpoint.tokenizer, prompt, sampling).tokens


def test_what_is_read_back_is_what_was_written(network, reader, encode, saved):
    written, found = read_document(network, TEXT, encode, chunk=100), load_document(saved, network, reader)
    assert (found.text, found.ids) == (written.text, written.ids)
    for one, other in zip(written.keys, found.keys, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_another_prompt_is_refused(network, checkpoint, encode, saved):
    with pytest.raises(InputError, match="does not begin with the document's tokens"):
        open_cache(saved, network, checkpoint.tokenizer, encode("x" + TEXT), 2000)


def test_another_reader_is_refused_and_named(network, reader, saved, checkpoint):
    other = MiniCPMSALAForCausalLM(checkpoint.config)
    with pytest.raises(InputError, match="it was read by other weights"):
        load_document(saved, other, reader_of(other, checkpoint.tokenizer))
    with pytest.raises(InputError, match="it was read with another tokenizer"):
        load_document(saved, network, replace(reader, tokenizer="another"))
    changed = json.dumps({**json.loads(reader.configuration), "rope_theta": 5, "page_size": 128})
    with pytest.raises(InputError, match="other values of page_size, rope_theta"):
        load_document(saved, network, replace(reader, configuration=changed))


@pytest.mark.parametrize("place", [0.02, 0.3, 0.9, 0.999])
def test_a_changed_byte_is_seen(network, reader, saved, tmp_path, place):
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "bad.sala").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|cannot be read|no saved document|was read"):
        load_document(tmp_path / "bad.sala", network, reader)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_cut_file_is_refused(network, reader, saved, tmp_path, size):
    (tmp_path / "cut.sala").write_bytes(saved.read_bytes()[:size])
    with pytest.raises(InputError, match="cannot be read"):
        load_document(tmp_path / "cut.sala", network, reader)


def test_other_files_are_refused(network, reader, saved, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.sala")
    with pytest.raises(InputError, match="no saved document"):
        load_document(tmp_path / "other.sala", network, reader)
    with pytest.raises(InputError, match="no file"):
        load_document(tmp_path / "nothing.sala", network, reader)
    # a tensor short, and all checksums right
    tensors = load_file(saved)
    short = {name: tensor for name, tensor in tensors.items() if name != "layers.1.0"}
    from sala.engine import saved as module

    metadata = {
        "format": FORMAT,
        "weights": reader.weights,
        "tokenizer": reader.tokenizer,
        "configuration": reader.configuration,
        "checksums": json.dumps(module._checksums(short)),
    }
    save_file(short, tmp_path / "short.sala", metadata)
    with pytest.raises(InputError, match="bytes for"):
        load_document(tmp_path / "short.sala", network, reader)


def test_a_text_of_less_than_a_page_is_refused(network, encode):
    with pytest.raises(InputError, match="expected at least 64"):
        read_document(network, "short", encode, chunk=100)


def test_pages_hold_the_same_as_a_cache_in_one_piece(network, encode):
    document = read_document(network, TEXT, encode, chunk=100)
    runner = Runner(network, 2**24)
    places = list(range(3, 3 + len(document.ids) // runner.page_size))[::-1]
    sequence = runner.open(places)
    runner.extend([Extension(sequence, document.ids)])
    for one, other in zip(gather(runner.cache, places), document.keys, strict=True):
        assert [x.shape for x in one] == [x.shape for x in other]
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    elsewhere = [place + 40 for place in places]
    scatter(runner.cache, elsewhere, document.keys)
    restored = runner.restore([*elsewhere, 90], document.states)
    direct = runner.restore([*places, 91], runner.states(sequence))
    left, right = runner.extend([Extension(restored, [5, 6, 7]), Extension(direct, [5, 6, 7])])
    torch.testing.assert_close(left.logits_NX, right.logits_NX, atol=1e-3, rtol=1e-3)
