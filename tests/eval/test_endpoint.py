"""A server as a reader: what it answers, and what its failures cost."""

import re
from typing import Any

import numpy as np
import pytest

from eval.server import completion, serving
from sala.errors import InputError
from sala.eval import Prompt, Request, Window
from sala.eval.endpoint import EndpointReader
from sala.eval.task import ask

PROMPT = Prompt(ask("Say it."), ("it",), 5, " I say")


def requests(number: int) -> list[Request]:
    return [Request(i, PROMPT, tuple(range(i, i + 4))) for i in range(number)]


def reader(url: str, **changes: Any) -> EndpointReader:
    settings: dict[str, Any] = {"retries": 2, "timeout_s": 5.0, "pause": lambda seconds: None}
    return EndpointReader(url, "a-model", **(settings | changes))


def test_prompts_go_out_as_token_ids_and_answers_come_back_by_key() -> None:
    seen = []

    def reply(path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        seen.append((path, body["model"], body["max_tokens"], headers.get("Authorization")))
        return completion(f"got {body['prompt'][0]}", 4)

    with serving(reply) as url:
        answers = dict(reader(url, key="secret").generate(requests(20)))
    assert {key: answer.text for key, answer in answers.items()} == {i: f"got {i}" for i in range(20)}
    assert set(seen) == {("completions", "a-model", 5, "Bearer secret")}


def test_the_chat_interface_sends_messages_with_the_answers_start_at_their_end() -> None:
    def reply(path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        assert path == "chat/completions"
        return {"choices": [{"message": {"content": body["messages"][-1]["content"]}, "finish_reason": "stop"}]}

    with serving(reply) as url:
        [(_, answer)] = reader(url, interface="chat").generate(requests(1))
    assert answer.text == "Say it. I say"


def test_a_failure_that_passes_costs_nothing_and_waits_longer_each_time() -> None:
    waited: list[float] = []
    replies = iter([500, 503, completion("it", 4)])
    with serving(lambda *_: next(replies)) as url:
        [(_, answer)] = reader(url, pause=waited.append).generate(requests(1))
    assert answer.text == "it" and answer.error is None
    assert len(waited) == 2 and 0.25 <= waited[0] <= 0.75 <= 2 * waited[1]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (500, "status 500"),
        (400, "status 400"),
        (0.6, "Timeout|disconnected"),
        (b'{"choices": [{"te', "JSONDecodeError"),
        ({"choices": []}, "no choices"),
        (completion("", 4), "the answer is empty"),
        (completion("it", 2), "read 2 of the prompt's 4 tokens"),
    ],
)
def test_a_failure_for_good_is_the_error_of_one_sample(reply: Any, message: str) -> None:
    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        return reply if body["prompt"][0] == 1 else completion("it", 4)

    with serving(answer) as url:
        answers = dict(reader(url, timeout_s=0.3).generate(requests(3)))
    assert answers[0].text == answers[2].text == "it"
    assert answers[1].text == "" and re.search(message, answers[1].error)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everybody_ends_the_run(status: int) -> None:
    with serving(lambda *_: status) as url, pytest.raises(InputError, match=str(status)):
        list(reader(url).generate(requests(3)))


def test_no_more_requests_are_under_way_than_asked_for() -> None:
    taken = []

    def endless() -> Any:
        for i in range(50):
            taken.append(i)
            yield Request(i, PROMPT, (1, 2, 3, 4))

    with serving(lambda *_: completion("it", 4)) as url:
        answers = reader(url, concurrency=3).generate(endless())
        next(answers)
        assert len(taken) <= 3
        assert len(list(answers)) == 49


def test_probabilities_of_the_prompts_own_tokens_are_read_from_an_echo() -> None:
    def reply(path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        assert body["echo"] and body["prompt"] == [7, 8, 9]
        said = {
            "token_logprobs": [None, -0.5, -2.0, -1.0],
            "top_logprobs": [None, {"a": -0.5}, {"b": -0.1, "c": -2.0}, {"d": -1.0}],
        }
        return {"choices": [{"text": "", "logprobs": said}]}

    window = Window(np.array([7, 8, 9]), np.array([1, 2]))
    with serving(reply) as url:
        [(_, predictions)] = reader(url).predict([("w", window)])
    assert predictions.log_probs.tolist() == [-0.5, -2.0]
    assert predictions.right.tolist() == [True, False]


def test_a_server_without_echo_costs_the_sample_an_error() -> None:
    with serving(lambda *_: completion("it", 4)) as url:
        [(_, answer)] = reader(url).predict([("w", Window(np.array([7, 8]), np.array([1])))])
    assert "logprobs" in answer.error


def test_a_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="expected a URL"):
        EndpointReader("localhost:8000", "m")
