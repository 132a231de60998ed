"""A live server on the embedded hybrid, with a chat template, on a port of its own."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from sala.engine import Sampling, encode_prompt, generate, load, open_checkpoint
from sala.serve import server
from sala.serve.app import create_app
from sala.serve.settings import Settings

# turns end as those of most models do; what the assistant says is given back as it came
TEMPLATE = """\
{%- if tools %}{{ '[tools] ' + tools | tojson + '\n' }}{% endif %}
{%- for message in messages %}{{ message.role + ': ' + message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% if enable_thinking %}<think>{% endif %}{% endif %}"""
# key-value pairs in a text of some pages
BOOK = "".join(
    f"[set] @amber @{word} @cedar @delta\n# line {n}: {n * n}\n" for n, word in enumerate(["birch", "oak"] * 25)
)
QUESTION = "[get] @amber @birch"
# a long text with one place that answers the question
LONG = (
    BOOK.replace("@amber @birch", "@olive @onyx") * 2 + "[set] @amber @birch @cedar @delta\n" + "nothing here\n" * 200
)


# what needs more than the development environment, or minutes: asked for by name, `pytest -m browser`
OUTSIDE = ("browser", "abuse", "load")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        mark = next((name for name in OUTSIDE if item.get_closest_marker(name)), None)
        if mark is not None and mark not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason=f"needs `pytest -m {mark}`"))


@dataclass
class Live:
    """A server that listens."""

    url: str
    service: server.Service
    http: httpx.Client = field(repr=False)

    def settled(self) -> None:
        """Wait until nothing runs, and see that nothing is held."""
        deadline = time.monotonic() + 20
        status = self.service.engine.status()
        while (status.running or status.waiting) and time.monotonic() < deadline:
            time.sleep(0.02)
            status = self.service.engine.status()
        assert (status.running, status.waiting, status.running_bytes) == (0, 0, 0)


@pytest.fixture(scope="session")
def checkpoint():
    return open_checkpoint("embedded-hybrid")


@pytest.fixture(scope="session")
def network(checkpoint):
    return load(checkpoint, 1000, 512)


@pytest.fixture(scope="session")
def serving(checkpoint, network):
    """Return what starts a server for the time of a `with`."""

    @contextmanager
    def start(template: str | None = TEMPLATE, cache_bytes=2**28, limits=None, **settings) -> Iterator[Live]:
        settings = Settings(**{"name": "embedded-hybrid", "max_length": 20_000, **settings})
        limits = limits or server.EngineLimits(chunk=256)
        service = server.build(checkpoint, network, settings, limits, cache_bytes, template)
        bound = server.listen("127.0.0.1", 0)
        running = server.configured(create_app(service))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                while not running.started:
                    time.sleep(0.01)
                yield Live(url, service, http)
        finally:
            running.should_exit = True
            thread.join(40)
            assert not thread.is_alive() and not service.engine.is_alive
            bound.close()

    # no proxy of this machine between a client and its own server
    os.environ["NO_PROXY"] = "127.0.0.1"
    return start


@pytest.fixture(scope="session")
def live(serving):
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def alone(checkpoint, network):
    """Return the answer of `generate` to a text."""

    def answer(text, new=8, **options):
        ids = (
            text if isinstance(text, list) else encode_prompt(checkpoint.tokenizer, text, checkpoint.config.vocab_size)
        )
        return generate(network, checkpoint.tokenizer, ids, Sampling(max_new_tokens=new, **options))

    return answer
