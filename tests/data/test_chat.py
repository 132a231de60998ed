"""Laws of chat data: the template's text as it is, and loss on what the assistant wrote and on nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
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
    chat = with_template(CHATML).render(TALK)
    assert answers(chat) == ["Hello<|im_end|>\n", "  So long \n<|im_end|>\n"]
    assert chat.text == with_template(CHATML).tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_marks_answers_is_believed(with_template: With) -> None:
    chat = with_template(MARKED).render(TALK)
    assert answers(chat) == ["Hello\n", "  So long \n\n"]
    assert chat.text == "U: Be brief.\nU: Hi\nA:\nHello\nU: Bye\nA:\n  So long \n\n"


def test_a_template_that_rewrites_earlier_answers_is_refused(with_template: With) -> None:
    template = with_template(FORGETFUL)
    with pytest.raises(InputError, match=r"writes message 3 of a\.jsonl:7 in another way.*generation"):
        template.render(TALK, name="a.jsonl:7")
    assert answers(template.render(TALK[:3])) == ["<think></think>Hello\n"]


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(with_template: With) -> None:
    template = with_template(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    with pytest.raises(InputError, match="writes message 2 of a conversation in another way when it is asked for"):
        template.render(TALK[1:3])


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
