"""Every field is kept or refused by its name; nothing a client sends makes a 500 or leaves anything behind."""

import json
import socket
import threading
import time

import httpx
import pytest

from sala.serve.server import EngineLimits
from serve.conftest import BOOK, QUESTION

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def events(response):
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def error(response, status=400):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_health_version_and_status(live):
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.get("/version").json()["version"]
    assert live.http.get("/status").json()["running"] == 0


def test_metrics_count_what_was_read_and_found(serving):
    with serving() as live:
        for _ in range(2):
            live.http.post(TEXT, json={"prompt": BOOK, "max_tokens": 1})
        text = live.http.get("/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(lines["sala_generated_tokens_total"]) == 2
        assert float(lines["sala_cached_tokens_total"]) > 0.8 * float(lines["sala_prompt_tokens_total"]) / 2
        assert lines['sala_http_requests_total{route="/v1/completions",status="200"}'] == "2.0"
        assert lines['sala_prefix_misses_total{why="nothing is kept"}'] == "1.0"


def test_tokens_there_and_back(live):
    tokens = live.http.post("/tokenize", json={"prompt": QUESTION}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert live.http.post("/detokenize", json={"tokens": tokens["tokens"][1:]}).json()["prompt"] == QUESTION


def test_prompts_may_be_token_ids_and_several(live, alone):
    ids = live.http.post("/tokenize", json={"prompt": BOOK + QUESTION}).json()["tokens"]
    reply = live.http.post(TEXT, json={"prompt": [ids, ids[:40]], "max_tokens": 3, "n": 2}).json()
    expected = [alone(ids, 3).text] * 2 + [alone(ids[:40], 3).text] * 2
    assert [choice["text"] for choice in reply["choices"]] == expected
    assert reply["usage"]["prompt_tokens"] == len(ids) + 40


def test_an_echo_with_log_probabilities_is_what_lm_eval_reads(live):
    body = {"prompt": QUESTION, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choice = live.http.post(TEXT, json=body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(QUESTION)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    own, tops = logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:]
    assert all(value <= max(top.values()) for value, top in zip(own, tops, strict=True))
    assert own[-1] == max(tops[-1].values())
    assert "".join(logprobs["tokens"][1:]) == choice["text"]
    only = live.http.post(TEXT, json={**body, "max_tokens": 0}).json()["choices"][0]
    assert only["logprobs"]["token_logprobs"] == pytest.approx(logprobs["token_logprobs"][:-1], abs=1e-4)


def test_a_streamed_completion_ends_with_done(live, alone):
    with live.http.stream("POST", TEXT, json={"prompt": QUESTION, "max_tokens": 6, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone(QUESTION, 6).text


def test_why_a_prompt_was_not_found_is_told_on_request(serving):
    with serving() as live:
        reply = live.http.post(TEXT, json={"prompt": BOOK, "max_tokens": 1, "debug": True}).json()
        assert reply["prefix"] == [{"cached_tokens": 0, "miss": "nothing is kept"}]
        reply = live.http.post(TEXT, json={"prompt": "x" + BOOK, "max_tokens": 1, "debug": True}).json()
        assert reply["prefix"][0]["miss"] == "other text from token 1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("suffix", "x"),
        ("unknown", 1),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("max_tokens", "3"),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 1),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**64),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"99999": 1}),
        ("stop", [""]),
        ("stop_token_ids", [99999]),
        ("logprobs", 21),
        ("stream_options", {"include_usage": True}),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("prompt", {"a": 1}),
        ("prompt", ["a", 1]),
        ("documents", ["nothing of this name"]),
        ("min_tokens", 17),
        ("model", 5),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(live, field, value):
    response = live.http.post(TEXT, json={"prompt": "a", field: value})
    assert field.split("_")[0] in error(response, response.status_code)["message"].lower()
    assert response.status_code in (400, 404)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "robot", "content": "a"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages", "hello"),
        ("top_logprobs", 2),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "x"}}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}),
        ("chat_template_kwargs", {"chat_template": "x"}),
        ("parallel_tool_calls", False),
        ("reasoning_effort", "low"),
        ("modalities", ["audio"]),
        ("max_completion_tokens", -3),
        ("min_tokens", 1),
        ("ignore_eos", True),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(live, field, value):
    form = {"response_format": {"type": "json_object"}} if field in ("min_tokens", "ignore_eos") else {}
    found = error(live.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, **form, field: value}))
    assert field in found["message"] or field in (found["param"] or "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"prompt": "a", "\\ud800": 1}',
    ],
)
def test_a_malformed_body_is_refused(live, body):
    error(live.http.post(TEXT, content=body, headers={"content-type": "application/json"}))


def test_a_body_that_is_not_marked_as_json_says_so(live):
    assert "Content-Type" in error(live.http.post(TEXT, content=b'{"prompt": "a"}'))["message"]


def test_paths_and_methods_that_do_not_exist(live):
    error(live.http.get("/nowhere"), 404)
    error(live.http.get(CHAT), 405)
    error(live.http.get("/v1/models/other"), 404)


def test_a_model_without_template_says_where_to_ask(serving):
    with serving(template=None) as live:
        assert "/v1/completions" in error(live.http.post(CHAT, json={"messages": MESSAGES}))["message"]


def test_a_key_is_asked_for_where_there_are_keys(serving):
    with serving(api_keys=("secret", "other")) as live:
        assert live.http.get("/health").status_code == 200
        assert error(live.http.get("/v1/models"), 401)["code"] == "invalid_api_key"
        for header in ("Bearer wrong", "secret", "Basic secret", "Bearer secret2"):
            error(live.http.get("/v1/models", headers={"authorization": header}), 401)
        assert live.http.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 200


def test_request_ids_are_kept_or_given(live):
    assert live.http.get("/version", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert live.http.get("/version", headers={"x-request-id": "a b\x7f"}).headers["x-request-id"].startswith("req-")


def test_a_large_body_and_a_slow_one_are_refused(serving):
    with serving(max_body_bytes=1000, body_s=0.3) as live:
        error(live.http.post(TEXT, json={"prompt": "a" * 2000}), 413)

        def parts():
            yield b"a" * 600
            yield b"a" * 600

        error(live.http.post(TEXT, content=parts()), 413)
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)


def test_a_half_closed_or_broken_connection_leaves_nothing(live):
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": BOOK * 4, "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for how in ("half-closed", "after the head", "in the body", "while it reads"):
        with socket.create_connection((host, int(port)), timeout=10) as broken:
            broken.sendall(head.encode())
            if how != "after the head":
                broken.sendall(body[:100] if how == "in the body" else body)
            if how == "half-closed":
                broken.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
    live.settled()
    assert live.http.get("/health").status_code == 200


def test_a_client_that_leaves_a_stream_frees_the_engine(live):
    body = {"prompt": BOOK, "max_tokens": 5000, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", TEXT, json=body) as response:
        next(response.iter_lines())
    live.settled()


def test_a_client_that_leaves_an_answer_in_one_piece_frees_the_engine(live):
    with pytest.raises(httpx.ReadTimeout):
        live.http.post(TEXT, json={"prompt": BOOK, "max_tokens": 5000, "ignore_eos": True}, timeout=0.3)
    live.settled()


def test_an_answer_has_to_come_in_time(serving):
    with serving(request_s=0.3) as live:
        body = {"prompt": BOOK, "max_tokens": 5000, "ignore_eos": True}
        assert "0.3 s" in error(live.http.post(TEXT, json=body), 504)["message"]
        with live.http.stream("POST", TEXT, json={**body, "stream": True}) as response:
            assert events(response)[-1]["error"]["type"] == "timeout_error"
        live.settled()


def test_a_full_queue_is_429_and_what_never_fits_400(serving):
    with serving(limits=EngineLimits(chunk=64, max_running=1, max_waiting=1)) as live:
        found = []
        body = {"prompt": BOOK, "max_tokens": 60, "ignore_eos": True}

        def ask(number):
            asked = {**body, "prompt": f"{number}{BOOK}", "stream": number % 2 == 1}
            found.append(live.http.post(TEXT, json=asked).status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429}
        assert "expected at most 20,000" in error(live.http.post(TEXT, json={"prompt": [5] * 20_001}))["message"]


def test_a_long_prompt_keeps_the_connection_alive(serving):
    with serving(keep_alive_s=0.05, limits=EngineLimits(chunk=64)) as live:
        body = {"prompt": BOOK * 6, "max_tokens": 1, "stream": True}
        with live.http.stream("POST", TEXT, json=body) as response:
            lines = list(response.iter_lines())
        assert lines[-2] == "data: [DONE]"
        assert lines.count(": keep-alive") >= 2


def test_leaving_finishes_the_answers_that_are_begun(serving, alone):
    with serving() as live:
        replies = []
        url, body = live.url + TEXT, {"prompt": BOOK + QUESTION, "max_tokens": 40}
        thread = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body, timeout=60).json()))
        thread.start()
        while not live.service.engine.status().running:
            time.sleep(0.01)
    thread.join(30)
    assert replies[0]["choices"][0]["text"] == alone(BOOK + QUESTION, 40).text


def test_prompts_are_logged_only_on_request(serving, caplog):
    with caplog.at_level("INFO", logger="sala.serve"):
        for wanted in (False, True):
            caplog.clear()
            with serving(log_prompts=wanted) as live:
                live.http.post(TEXT, json={"prompt": "a very private matter", "max_tokens": 1})
            assert ("private" in caplog.text) == wanted
            assert '"path": "/v1/completions", "status": 200' in caplog.text
