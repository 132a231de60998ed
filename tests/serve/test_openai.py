"""The official client works unmodified, and greedy text is that of `generate`."""

import json

import pytest

from serve.conftest import BOOK, QUESTION, TEMPLATE

openai = pytest.importorskip("openai")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find a value.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"enum": [1, 2]}},
            "required": ["key"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "hello"}]
MODEL = "embedded-hybrid"


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_text(content, role="user"):
    return f"{role}: {content}\nassistant:"


def test_a_completion_is_that_of_generate(client, alone):
    reply = client.completions.create(model=MODEL, prompt=BOOK + QUESTION, max_tokens=2)
    assert reply.choices[0].text == alone(BOOK + QUESTION, 2).text == " @cedar @delta"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2


def test_a_chat_is_the_template_and_its_answer(client, alone):
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
    assert reply.choices[0].message.content == alone(chat_text("hello"), 12).text
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"


def test_a_stream_is_the_same_text_with_the_usage_at_its_end(client, alone):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(chat_text("hello"), 12).text
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_without_asking_no_chunk_is_empty(client):
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, stream=True)
    assert all(chunk.choices for chunk in chunks)


def test_the_stream_helper_collects_the_same(client, alone):
    whole = alone(chat_text("hello"), 16).text
    # the helper raises where an answer ends by its length
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=16, stop=whole[9:14]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole[: whole.index(whole[9:14])]


def test_two_choices_have_seeds_of_their_own_and_one_prompt(client, alone):
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 3}
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, **options)
    texts = [choice.message.content for choice in reply.choices]
    assert texts == [alone(chat_text("hello"), 10, temperature=1.0, seed=seed).text for seed in (3, 4)]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.completion_tokens == 20


def test_a_stop_string_is_found_across_chunks(client, alone):
    whole = alone(chat_text("hello"), 16).text
    stop = whole[7:12]
    pieces = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, stop=[stop], stream=True)
    chunks = list(pieces)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_tool_that_must_be_called_is_called(client):
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=60
    )
    (call,) = reply.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "look_up")
    assert isinstance(json.loads(call.function.arguments)["key"], int)
    assert reply.choices[0].finish_reason == "tool_calls"


def test_a_streamed_call_has_index_type_and_name(client):
    choice = {"type": "function", "function": {"name": "look_up"}}
    chunks = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=60, stream=True
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.type, call.function.name) for call in deltas] == [(0, "function", "look_up")]


def test_a_conversation_with_a_call_and_its_result_is_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"key": 1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=2)
    assert reply.usage.completion_tokens == 2


def test_json_of_a_schema_is_answered(client):
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "size": {"enum": ["s", "m"]}},
        "required": ["yes", "size"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    answer = json.loads(reply.choices[0].message.content)
    assert set(answer) == {"yes", "size"} and answer["size"] in ("s", "m")
    assert reply.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_their_tokens(client):
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert len(content) == 4
    assert all(entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 3 for entry in content)
    assert "".join(entry.token for entry in content) == reply.choices[0].message.content


def test_streamed_log_probabilities_are_complete(client):
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "logprobs": True}
    chunks = list(client.chat.completions.create(**options, stream=True))
    streamed = [
        entry.token for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    assert streamed == [entry.token for entry in whole]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.BadRequestError, match="expected at most 20,000") as caught:
        client.completions.create(model=MODEL, prompt="a", max_tokens=30_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"best_off": 2})
    assert caught.value.param == "best_off"


def test_the_second_question_finds_the_first_one_s_text(client, alone):
    story = "".join(f"note {n}: {n * 7}\n" for n in range(120))
    for question in ("one", "another"):
        messages = [{"role": "user", "content": f"{story}\n{question}"}]
        reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
        assert reply.choices[0].message.content == alone(chat_text(f"{story}\n{question}"), 6).text
    assert reply.usage.prompt_tokens_details.cached_tokens > 0.8 * reply.usage.prompt_tokens


def test_template_options_reach_the_template_and_thoughts_are_apart(client):
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
    )
    assert "enable_thinking" in TEMPLATE
    assert reply.choices[0].message.content == "" and reply.choices[0].message.reasoning_content
