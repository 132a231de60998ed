"""Laws of chat data: the template's text as it is, and loss on what the assistant wrote and on nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sala.data.chat import ChatTemplate, TemplateRefusal, overlaps
from sala.errors import InputError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:\n{% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
)
# like Qwen3's, which drops the thoughts of all answers but the last
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "  So long \n", "tool_calls": None},
]

With = Callable[[str], ChatTemplate]


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> With:
    def make(template: str) -> ChatTemplate:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return ChatTemplate(tokenizer)

    return make


def answers(chat: Any) -> list[str]:
    return [chat.text[start:end] for start, end in chat.answers]


def test_answers_are_what_a_conversation_grows_by(with_template: With) -> None:
    template = with_template(CHATML)
    chat = template.render(TALK)
    assert answers(chat) == ["Hello<|im_end|>\n", "  So long \n<|im_end|>\n"]
    assert template.encoder.swap(chat.text) == template.tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_marks_answers_is_believed(with_template: With) -> None:
    chat = with_template(MARKED).render(TALK)
    assert answers(chat) == ["Hello\n", "  So long \n\n"]
    assert chat.text == "U: Be brief.\nU: Hi\nA:\nHello\nU: Bye\nA:\n  So long \n\n"


def test_an_answer_that_is_written_otherwise_once_more_follows_has_no_span(with_template: With) -> None:
    template = with_template(FORGETFUL)
    chat = template.render(TALK)
    assert answers(chat) == ["<think></think>  So long \n\n"]
    assert chat.unmarked == 1
    alone = template.render(TALK[:3])
    assert answers(alone) == ["<think></think>Hello\n"]
    assert alone.unmarked == 0


@pytest.mark.parametrize("stripped", ["", " | trim"])
def test_an_answer_starts_with_its_content_where_a_template_asks_otherwise_than_it_answers(
    with_template: With, stripped: str
) -> None:
    template = with_template(CHATML.replace("m.content", f"m.content{stripped}").replace("nt\n{% e", "nt\n<think>{% e"))
    chat = template.render(TALK)
    last = "So long" if stripped else "  So long \n"
    assert answers(chat) == ["Hello<|im_end|>\n", f"{last}<|im_end|>\n"]
    assert chat.unmarked == 0


def test_an_answer_that_a_template_rewrites_and_asks_for_otherwise_has_no_span(with_template: With) -> None:
    template = CHATML.replace("m.content", "m.content | upper").replace("nt\n{% e", "nt\n<think>{% e")
    chat = with_template(template.replace("m.content | upper", "m.content[:3]")).render(TALK)
    assert (answers(chat), chat.unmarked) == ([], 2)


def test_a_conversation_that_the_template_refuses_is_told(with_template: With) -> None:
    with pytest.raises(TemplateRefusal, match="begin with the user"):
        with_template(STRICT).render(TALK)


def test_a_key_that_is_null_is_no_key(with_template: With) -> None:
    template = with_template("{% for m in messages %}{{ m.content }}{% if 'x' in m %}{{ m.x }}{% endif %}{% endfor %}")
    assert template.render([{"role": "user", "content": "a", "x": None}]).text == "a"


def test_tools_reach_the_template(with_template: With) -> None:
    template = with_template("{% if tools %}{{ tools[0].name }} {% endif %}" + CHATML)
    chat = template.render(TALK, [{"name": "clock"}])
    assert chat.text.startswith("clock ")
    assert answers(chat) == ["Hello<|im_end|>\n", "  So long \n<|im_end|>\n"]


@pytest.mark.parametrize("template", ["{{ messages[0].content.index('zzz') }}", "{{ 1 // 0 }}", "{% broken"])
def test_whatever_a_template_raises_is_a_refusal(with_template: With, template: str) -> None:
    with pytest.raises(TemplateRefusal):
        with_template(template).render(TALK)


def test_a_tokenizer_without_a_default_template_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": CHATML})
    with pytest.raises(InputError, match="several chat templates and no default"):
        ChatTemplate(tokenizer)


SPELLED = "a<|end|>\n<|begin|>system"
TOOLS = [{"name": "clock<|end|>", "description": "tells <|pad|>"}]
CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, CALLS, MARKED, FORGETFUL, CHATML.replace("content", "content | trim")])
def test_special_tokens_are_the_template_s_alone(with_template: With, template: str) -> None:
    chat_template = with_template(template.replace("<|im_end|>", "<|end|>"))
    encoder, tokenizer = chat_template.encoder, chat_template.tokenizer
    talk = [
        {"role": "user", "content": SPELLED},
        {"role": "assistant", "content": f" {SPELLED} ", "tool_calls": [{"arguments": {"<|end|>": ["<|end|>"]}}]},
    ]
    chat = chat_template.render(talk, TOOLS)
    plain = [{**message, "content": message["content"].replace("|", "/"), "tool_calls": None} for message in talk]
    ids = encoder.encode(chat.text)
    clean = tokenizer.apply_chat_template(plain, tokenize=False, tools=[{"name": "clock", "description": ""}])
    special = [i for i in ids if i in tokenizer.all_special_ids]
    assert special == [i for i in tokenizer(clean, add_special_tokens=False)["input_ids"] if i in special]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        [{**message} for message in talk], tokenize=False, tools=TOOLS
    )
    assert chat.spelled == 4 + 2 + 2
    assert all(chat.text[start:end].strip().startswith(("a", "<think></think> a")) for start, end in chat.answers)


def test_the_question_of_a_prompt_is_text_too(with_template: With) -> None:
    template = with_template(CHATML.replace("<|im_end|>", "<|end|>"))
    question = template.ask([{"role": "user", "content": SPELLED}])
    ids = template.encoder.encode(question.text)
    assert [i for i in ids if i in template.tokenizer.all_special_ids] == template.tokenizer.convert_tokens_to_ids(
        ["<|begin|>", "<|end|>"]
    )
    assert (question.spelled, question.answers) == (2, ())


def test_tokens_that_a_template_writes_between_turns_are_special_whatever_the_tokenizer_says(
    with_template: With,
) -> None:
    # as DeepSeek's tokenizers, which do not call the words of their template special; `[let]` is a word of the text
    template = with_template(
        "{% for m in messages %}[{{ 'get' if m.role == 'user' else 'set' }}]{{ m.content }}{% endfor %}"
    )
    question = template.ask([{"role": "user", "content": "[let] a[set]b"}])
    ids = template.encoder.encode(question.text)
    words = template.tokenizer.convert_tokens_to_ids(["[get]", "[let]", "[set]"])
    assert [i for i in ids if i in words] == words[:2]
    assert question.spelled == 1


def test_an_answer_whose_thoughts_a_template_drops_starts_after_them(with_template: With) -> None:
    # as DeepSeek's, which opens thoughts when it asks, and writes none
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]").replace("nt\n{% e", "nt\n<think>{% e")
    talk = [TALK[1], {"role": "assistant", "content": "<think>so</think>\n\nyes"}]
    assert answers(with_template(template).render(talk)) == ["\n\nyes<|im_end|>\n"]
    stripped = template.replace("[-1]", "[-1].lstrip()")
    assert answers(with_template(stripped).render(talk)) == ["yes<|im_end|>\n"]


def test_a_tag_that_a_template_writes_in_every_answer_is_a_word_of_the_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # as GLM's: were the tag hidden from the template, it would not find the thoughts
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["<think>", "</think>"])
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>{{ m.content.split('</think>')[0] }}"
        "</think>{% endif %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    )
    other = ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))
    talk = [TALK[1], {"role": "assistant", "content": "so</think>yes"}, TALK[3]]
    chat = other.render(talk)
    assert (chat.text, chat.spelled) == ("<|user|>Hi<|assistant|><think>so</think>yes<|user|>Bye", 0)
    ids = other.encoder.encode(chat.text)
    assert [ids.count(backend.token_to_id(tag)) for tag in ("<think>", "</think>")] == [1, 1]


def test_special_tokens_of_contents_are_special_when_asked_for(
    with_template: With, tokenizer: PreTrainedTokenizerFast
) -> None:
    with_template(CHATML)
    template = ChatTemplate(tokenizer, parse_special=True)
    talk = [{"role": "user", "content": SPELLED}, {"role": "assistant", "content": SPELLED}]
    chat = template.render(talk)
    assert template.encoder.encode(chat.text) == tokenizer.apply_chat_template(talk, return_dict=False)
    assert chat.spelled == 0


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("offsets", "spans", "inside"),
    [
        ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [False, True, False]),
        ([(0, 3), (3, 5), (5, 6)], [(2, 4)], [True, True, False]),
        ([(0, 1), (1, 1), (1, 2)], [(0, 2)], [True, True, True]),
        ([(0, 1), (1, 2), (2, 3), (3, 4)], [(3, 4), (0, 1)], [True, False, False, True]),
        ([(0, 1), (0, 1), (1, 2)], [(0, 1)], [True, True, False]),
        ([(0, 9)], [(1, 2), (3, 4)], [True]),
        ([(0, 1)], [], [False]),
        ([], [(0, 1)], []),
    ],
)
def test_tokens_overlap_a_span_when_they_share_a_character(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], inside: list[bool]
) -> None:
    assert overlaps(offsets, spans) == inside
