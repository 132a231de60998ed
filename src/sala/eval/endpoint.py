"""A reader behind a URL: any server with OpenAI's completions interface."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

import numpy as np

from sala.errors import InputError, shortened
from sala.eval.reader import Answer, Request
from sala.eval.task import Predictions, Window

try:
    import httpx
except ImportError as error:
    raise InputError("an endpoint needs httpx; expected pip install 'sala[eval]'") from error

# what a server may say once and not again
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# what it says to every request
REFUSED = frozenset({401, 403, 404})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0


class SampleError(Exception):
    """A request that has no answer; the message says why."""


class EndpointReader:
    """Answers through `POST {url}/completions`, prompts as token ids, or through `/chat/completions`, as messages.

    With token ids a server reads exactly the tokens that were counted. What fails is tried again, later each time; what
    fails for good is an error of that sample.

    url: up to and with `/v1`. interface "chat": the server's own template; the start of an answer ends the user's turn.
    sampling: fields of the request besides the prompt, such as temperature.

    Raises:
        InputError: while answering: the server refuses everybody (401, 403, 404), or is not there at the first request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        interface: Literal["completions", "chat"] = "completions",
        concurrency: int = 8,
        retries: int = 4,
        timeout_s: float = 600.0,
        sampling: dict[str, Any] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"endpoint {shortened(url)!r}; expected a URL such as http://localhost:8000/v1")
        self.url, self.name, self.interface = url.rstrip("/"), model, interface
        self.concurrency, self.retries, self.pause = concurrency, retries, pause
        self.sampling = {"temperature": 0.0} if sampling is None else sampling
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.connect = partial(httpx.Client, timeout=timeout_s, headers=headers)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        return self._spread(requests, lambda request: request.key, self._generate)

    def predict(self, windows: Iterable[tuple[Any, Window]]) -> Iterator[tuple[Any, Predictions | Answer]]:
        return self._spread(windows, lambda row: row[0], lambda client, row: self._predict(client, row[1]))

    def _spread(
        self, items: Iterable[Any], key: Callable[[Any], Any], work: Callable[[httpx.Client, Any], Any]
    ) -> Iterator[Any]:
        """Yield (key, result) as work is done, with at most `concurrency` items taken from `items` and not yet answered."""
        running: dict[Future[Any], Any] = {}
        with self.connect() as client, ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for item in items:
                    running[pool.submit(work, client, item)] = key(item)
                    if len(running) >= self.concurrency:
                        yield from _finished(running)
                while running:
                    yield from _finished(running)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, client: httpx.Client, request: Request) -> Answer:
        prompt = request.prompt
        body: dict[str, Any] = {"model": self.name, "max_tokens": prompt.max_new_tokens, **self.sampling}
        if self.interface == "chat":
            *before, last = prompt.messages
            body["messages"] = [*map(dict, before), {**last, "content": f"{last['content']}{prompt.prefix}"}]
        else:
            body["prompt"] = list(request.tokens)
        try:
            reply = self._post(client, "chat/completions" if self.interface == "chat" else "completions", body)
            choice, read = _choice(reply), (reply.get("usage") or {}).get("prompt_tokens")
            text = choice["message"]["content"] if self.interface == "chat" else choice["text"]
            if self.interface == "completions" and isinstance(read, int) and read < len(request.tokens):
                raise SampleError(f"the server read {read:,} of the prompt's {len(request.tokens):,} tokens")
            if not isinstance(text, str) or not text:
                raise SampleError(f"the answer is empty (finish_reason {choice.get('finish_reason')!r})")
            return Answer(text, choice.get("finish_reason"), read_tokens=read)
        except (SampleError, KeyError, TypeError) as error:
            return Answer(error=_said(error))

    def _predict(self, client: httpx.Client, window: Window) -> Predictions | Answer:
        """Ask for the probabilities of the prompt's own tokens (`echo`)."""
        body = {"model": self.name, "prompt": window.tokens.tolist(), "max_tokens": 1, "temperature": 0.0}
        try:
            reply = self._post(client, "completions", {**body, "logprobs": 1, "echo": True})
            said = _choice(reply)["logprobs"]
            if len(said["token_logprobs"]) < len(window.tokens):
                told = len(said["token_logprobs"])
                raise SampleError(f"the server told {told:,} of {len(window.tokens):,} probabilities")
            log_probs = np.array([said["token_logprobs"][i] for i in window.asked], np.float64)
            likeliest = [max(said["top_logprobs"][i].values()) for i in window.asked]
            return Predictions(log_probs, log_probs >= np.array(likeliest))
        except (SampleError, KeyError, TypeError, ValueError) as error:
            return Answer(error=_said(error))

    def _post(self, client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                # jitter, so that many do not come back at once
                self.pause(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * (0.5 + random.random()))
            try:
                response = client.post(f"{self.url}/{path}", json=body)
                if response.status_code in REFUSED:
                    raise InputError(
                        f"{self.url}/{path} answers {response.status_code} {shortened(response.text, 200)!r}; expected an "
                        "endpoint with this path that takes the key (--key-variable)"
                    )
                if response.status_code == 200:
                    reply = response.json()
                    if isinstance(reply, dict):
                        return reply
                    said = f"the reply is a {type(reply).__name__}"
                else:
                    said = f"status {response.status_code}: {shortened(response.text, 200)}"
                    if response.status_code not in RETRIED:
                        break
            except (httpx.HTTPError, ValueError) as error:
                said = _said(error)
        raise SampleError(f"{said} (after {attempt + 1} attempts)")


def _finished(running: dict[Future[Any], Any]) -> Iterator[tuple[Any, Any]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _choice(reply: dict[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise SampleError("the reply has no choices")
    return choices[0]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
