"""What is read, in which order, and what is refused."""

import io
import os
from threading import Thread

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sala.engine import encode_prompt, join, read_documents
from sala.errors import InputError

NOTHING = io.BytesIO()


def written(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_single_file_is_read_as_it_is(tmp_path):
    written(tmp_path, a_txt="grüß\n  dich\n")
    assert read_documents([str(tmp_path / "a.txt")], NOTHING).text == "grüß\n  dich\n"


def test_a_byte_order_mark_is_no_text(tmp_path):
    written(tmp_path, a_txt="\ufeffhello".encode())
    assert read_documents([str(tmp_path / "a.txt")], NOTHING).text == "hello"


def test_a_folder_is_read_in_the_order_of_its_paths_and_counts_what_it_passes_over(tmp_path):
    written(
        tmp_path, z_py="z", a__b_py="ab", a_py="a", blob_bin=b"\0\1", bad_txt=b"\xff\xfe", empty_txt="", _hidden__x="h"
    )
    documents = read_documents([str(tmp_path)], NOTHING)
    assert [text.text for text in documents.texts] == ["ab", "a", "z"]
    assert documents.skipped == 4
    assert f"# {tmp_path / 'a.py'}\na\n" in documents.text


def test_globs_files_and_standard_input_keep_the_order_given(tmp_path):
    written(tmp_path, b_py="b", a_py="a", c_txt="c")
    sources = [str(tmp_path / "c.txt"), "-", str(tmp_path / "**" / "*.py")]
    documents = read_documents(sources, io.BytesIO(b"typed"))
    assert [text.text for text in documents.texts] == ["c", "typed", "a", "b"]


def test_a_name_that_is_no_unicode_is_text_all_the_same(tmp_path, tokenizer):
    written(tmp_path, a_txt="a")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("b")
    text = read_documents([str(tmp_path)], NOTHING).text
    assert "\ufffd.txt\nb" in text
    assert encode_prompt(tokenizer, text, len(tokenizer))


def test_no_file_is_read_twice(tmp_path):
    written(tmp_path, a_py="a", b_py="b")
    documents = read_documents([str(tmp_path / "b.py"), str(tmp_path), str(tmp_path / "*.py")][:2], NOTHING)
    assert [text.text for text in documents.texts] == ["b", "a"]


def test_pipes_are_read_once_to_their_end(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = Thread(target=pipe.write_text, args=("piped",))
    writer.start()
    # as bash's <(command) does it
    reader, end = os.pipe()
    os.write(end, b"a process")
    os.close(end)
    sources = [str(pipe), f"/dev/fd/{reader}", str(pipe)]
    assert [text.text for text in read_documents(sources, NOTHING).texts] == ["piped", "a process"]
    writer.join()
    os.close(reader)


def test_links_are_not_followed_out_of_a_folder_or_a_glob_and_are_counted(tmp_path):
    written(tmp_path, in__a_txt="in", out__secret_txt="secret", in__sub__b_txt="b")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "out" / "secret.txt")
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    for source in ("in", "in/**/*", "in/**"):
        documents = read_documents([str(tmp_path / source)], NOTHING)
        assert [text.text for text in documents.texts] == ["in", "b"], source
        assert documents.links == 2
    assert read_documents([str(tmp_path / "in" / "link.txt")], NOTHING).text == "secret"


def test_a_glob_passes_hidden_names_over_unless_it_names_them(tmp_path):
    written(tmp_path, a_txt="a", _b="b", c___d_txt="d")
    assert read_documents([str(tmp_path / "**" / "*")], NOTHING).text == "a"
    assert read_documents([str(tmp_path / ".*")], NOTHING).text == "b"


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    written(tmp_path, a_txt="a")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    for source in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"a\.txt' cannot be read: Permission denied"):
            read_documents([str(source)], NOTHING)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b" \n", "'.*empty' is empty"),
        ("mark", b"\xef\xbb\xbf\n", "'.*mark' is empty"),
        ("binary", b"PNG\0\1", "binary file"),
        ("latin", b"gr\xfc\xdf", "is not UTF-8 .byte 2 is 0xfc"),
    ],
)
def test_a_named_file_that_is_no_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents([str(tmp_path / name)], NOTHING)


@pytest.mark.parametrize(
    ("source", "message"), [("nope.txt", "no file or folder"), ("*.nope", "no text in"), (".", "no text in")]
)
def test_a_source_without_text_is_refused(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read_documents([source], NOTHING)


def test_empty_standard_input_is_refused():
    with pytest.raises(InputError, match="standard input"):
        read_documents(["-"], io.BytesIO())


def test_the_document_comes_first_and_the_prompt_last():
    assert join("text\n\n\n", "question") == "text\n\nquestion"
    assert join("", "question") == "question"
    assert join("text\n", "") == "text\n"
    with pytest.raises(InputError, match="nothing to read"):
        join("", "")


def test_the_start_token_is_put_first_once(tokenizer):
    ids = encode_prompt(tokenizer, "hello", len(tokenizer))
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def words(**settings):
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "<s>", "user:", "hello", "bot:"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="[UNK]", **settings)


def test_a_start_token_is_added_only_where_the_configuration_says_so():
    # Qwen names a start token and never writes it; MiniCPM's numbers are wrong without it
    assert encode_prompt(words(), "hello", 5) == [3]
    tokenizer = words()
    tokenizer.add_bos_token = True
    assert encode_prompt(tokenizer, "hello", 5) == [1, 3]


@pytest.mark.parametrize("begin", ["", "<s> "])
def test_a_chat_template_is_applied_with_one_start_token(begin):
    template = (
        begin
        + "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} bot:{% endif %}"
    )
    tokenizer = words(chat_template=template)
    tokenizer.add_bos_token = True
    assert encode_prompt(tokenizer, "hello", 5, chat=True) == [1, 2, 3, 4]


CHATML = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_spelled_out_in_a_prompt_are_text_and_counted(tokenizer, monkeypatch, chat):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    text, counts = "<|begin|>one<|end|> [set] @amber<|end|>", []
    ids = encode_prompt(tokenizer, text, len(tokenizer), chat, on_spelled=counts.append)
    assert counts == [3]
    special = [i for i in ids if i in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(special) == ["<|begin|>", "<|end|>"][: 1 + chat]
    assert tokenizer.decode(ids) == "<|begin|>" + text + "<|end|>>" * chat
    assert tokenizer.convert_tokens_to_ids([" @amber"])[0] in ids

    asked = encode_prompt(tokenizer, text, len(tokenizer), chat, parse_special=True, on_spelled=counts.append)
    assert counts == [3]
    special = [i for i in asked if i in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(special) == ["<|begin|>", "<|end|>", "<|end|>", "<|end|>"][: 3 + chat]


def test_a_prompt_that_is_no_unicode_is_refused(tokenizer):
    # what Python makes of a byte on the command line that is not UTF-8
    with pytest.raises(InputError, match="character 3 of the prompt is no whole character; expected UTF-8"):
        encode_prompt(tokenizer, "ab\udcff", len(tokenizer))


def test_a_prompt_that_the_chat_template_refuses_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('a system message first') }}")
    with pytest.raises(InputError, match="the chat template refuses the prompt: a system message first"):
        encode_prompt(tokenizer, "hello", len(tokenizer), chat=True)


def test_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(InputError, match="chat template"):
        encode_prompt(tokenizer, "hello", len(tokenizer), chat=True)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(InputError, match="embeddings for 0 to 99"):
        encode_prompt(tokenizer, "hello", 100)
