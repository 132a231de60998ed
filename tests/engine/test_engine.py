"""Through the engine an answer is the one of `generate`, whatever else runs and whatever was read before."""

import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from sala.engine import Sampling, encode_prompt, generate
from sala.engine.answer import AnswerOptions
from sala.engine.engine import Engine
from sala.engine.events import Done, EngineStoppedError, Piece, Progress, Started
from sala.engine.generate import end_tokens
from sala.engine.load import load, open_checkpoint
from sala.engine.runner import Runner
from sala.errors import MemoryLimitError

LINES = "".join(f"[set] @amber @birch @cedar @delta\n# note {n}: {n * n}\n" for n in range(60))
QUESTION = "\n[get] @amber @birch"


@dataclass
class Heard:
    """The events of one request."""

    events: list = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Done):
            self.over.set()

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def done(self):
        assert self.over.wait(60)
        return self.of(Done)[0]

    def tokens(self):
        self.done()
        return tuple(token for piece in self.of(Piece) for token in piece.tokens)

    def text(self):
        self.done()
        return "".join(piece.text for piece in self.of(Piece))


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint("embedded-hybrid")


@pytest.fixture(scope="module")
def network(checkpoint):
    return load(checkpoint, 1000, 512)


@pytest.fixture(scope="module")
def ids(checkpoint):
    return encode_prompt(checkpoint.tokenizer, LINES, checkpoint.config.vocab_size)


@pytest.fixture
def make(checkpoint, network):
    engines = []

    def start(total_tokens=20_000, **options):
        # a token takes 1,344 bytes, the states of a sequence 196,608, twice while it runs
        runner = Runner(network, total_tokens * 1344 + 16 * 196_608)
        engine = Engine(runner, checkpoint.tokenizer, end_tokens(network, checkpoint.tokenizer), **options)
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.stop(drain=False, timeout_s=30)


def submit(engine, prompt, new=6, heard=None, ends=(), **options):
    heard = heard or Heard()
    sampling = Sampling(max_new_tokens=new, **{k: options.pop(k) for k in ("seed", "temperature") if k in options})
    heard.name = engine.submit(prompt, AnswerOptions(sampling, **options), heard, ends=ends)
    return heard


@pytest.fixture(scope="module")
def alone(checkpoint, network):
    """Return the tokens of `generate`, computed once a prompt."""
    known = {}

    def answer(prompt, new=6, **options):
        key = (tuple(prompt), new, tuple(options.items()))
        if key not in known:
            sampling = Sampling(max_new_tokens=new, **options)
            known[key] = generate(network, checkpoint.tokenizer, prompt, sampling).tokens
        return known[key]

    return answer


def settled(engine):
    status = engine.status()
    assert (status.running, status.waiting, status.running_bytes) == (0, 0, 0)
    return status


def test_prompts_of_mixed_lengths_are_answered_as_each_alone(make, ids, alone):
    engine = make(chunk=128)
    prompts = [ids[:length] for length in (1, 2, 63, 64, 65, 200, 700)]
    heard = [submit(engine, prompt) for prompt in prompts]
    for prompt, each in zip(prompts, heard, strict=True):
        assert each.tokens() == alone(prompt)
    settled(engine)


@pytest.mark.parametrize("boundary", [64, 128, 640])
def test_a_prefix_found_changes_no_token_at_a_page_end_and_one_token_beside_it(make, ids, alone, boundary):
    engine = make()
    submit(engine, ids[: boundary + 10]).done()
    for length in (boundary - 1, boundary, boundary + 1, boundary + 2):
        # the text of one token less, the page end and one token more goes on in another way
        prompt = [*ids[:length], *ids[900:930]]
        heard = submit(engine, prompt)
        assert heard.tokens() == alone(prompt)
        assert heard.done().cached == (boundary if length >= boundary else boundary - 64) or length < boundary
    assert submit(engine, ids[: boundary + 10]).done().cached == boundary


def test_the_second_question_about_a_text_reads_the_question_alone(make, ids, alone, checkpoint):
    engine = make()
    submit(engine, [*ids, *ids[50:60]]).done()
    question = [*ids, *ids[70:90]]
    heard = submit(engine, question)
    done = heard.done()
    assert done.cached >= len(ids) - 128
    assert heard.tokens() == alone(question)


def test_a_conversation_goes_on_from_its_last_answer(make, ids, alone):
    engine = make()
    first = ids[:300]
    answer = submit(engine, first, new=150, ignore_end=True).tokens()
    follow = [*first, *answer, *ids[700:720]]
    heard = submit(engine, follow)
    assert heard.done().cached == (300 + len(answer) - 1) // 64 * 64
    assert heard.tokens() == alone(follow)


def test_why_nothing_was_found_is_said(make, ids):
    engine = make()
    assert submit(engine, ids[:200]).done().miss == "nothing is kept"
    other = submit(engine, [*ids[:130], *ids[300:400]])
    assert other.done().miss == "other text from token 130, and states before it only at token 0"
    # where the two part there are states now
    third = submit(engine, [*ids[:130], *ids[400:440]])
    assert third.done() and third.of(Started) == [Started(128, "")]


def test_a_seed_draws_the_same_whatever_else_runs(make, ids, alone):
    engine = make()
    options = {"temperature": 1.0, "seed": 5}
    others = [submit(engine, ids[n : n + 100], new=20, temperature=1.0, seed=n) for n in range(4)]
    heard = submit(engine, ids[:80], new=20, **options)
    assert heard.tokens() == alone(ids[:80], 20, **options)
    assert len({each.tokens() for each in others}) > 1


def test_preemption_changes_no_token(make, ids, alone):
    engine = make(total_tokens=-1300)
    prompts = [ids[100 * n : 100 * n + 150] for n in range(4)]
    heard = [submit(engine, prompt, new=50, ignore_end=True) for prompt in prompts]
    tokens = [each.tokens() for each in heard]
    status = settled(engine)
    assert status.preemptions > 0
    calm = make()
    for prompt, found in zip(prompts, tokens, strict=True):
        assert submit(calm, prompt, new=50, ignore_end=True).tokens() == found


def test_a_request_cancelled_while_it_reads_stops_within_a_chunk_and_is_resumed(make, ids, alone):
    engine = make(total_tokens=60_000, chunk=128)
    long = ids * 3
    heard = submit(engine, long)
    while not any(event.read >= 512 for event in heard.of(Progress)):
        time.sleep(0.005)
    engine.cancel(heard.name)
    assert heard.done().finish == "cancelled"
    read = heard.of(Progress)[-1].read
    assert read < len(long)
    settled(engine)
    again = submit(engine, long)
    assert again.done().cached == read
    assert again.tokens() == alone(long)


def test_a_cancelled_neighbour_changes_nothing(make, ids, alone):
    engine = make()
    doomed = submit(engine, ids[:900], new=500, ignore_end=True)
    heard = submit(engine, ids[20:220], new=40)
    engine.cancel(doomed.name)
    assert heard.tokens() == alone(ids[20:220], 40)
    assert doomed.done().finish == "cancelled"


def test_log_probabilities_of_a_prompt_are_those_of_the_model(make, ids, network):
    engine = make(chunk=64)
    prompt = ids[:150]
    heard = submit(engine, prompt, new=1, logprobs=2, prompt_logprobs=True)
    told = heard.done().prompt_logprobs
    with torch.inference_mode():
        expected = network(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [each.token for each in told] == list(prompt[1:])
    found = torch.tensor([each.logprob for each in told])
    torch.testing.assert_close(found, expected[range(149), prompt[1:]], rtol=0, atol=1e-4)
    piece = heard.of(Piece)[0].logprobs[0]
    assert piece.top[0][1] == pytest.approx(float(expected[-1].max()), abs=1e-4)


def test_a_prompt_may_be_read_without_an_answer(make, ids):
    engine = make()
    heard = submit(engine, ids[:100], prompt_only=True)
    assert heard.tokens() == () and heard.done().finish == "length"


def test_the_answer_is_not_over_before_its_shortest_length(make, ids, checkpoint, network):
    engine = make()
    ends = end_tokens(network, checkpoint.tokenizer)
    bias = tuple((token, 100.0) for token in ends)
    sampling = Sampling(max_new_tokens=9, logit_bias=bias)
    heard = Heard()
    engine.submit(ids[:50], AnswerOptions(sampling, min_new_tokens=3), heard)
    assert len(heard.tokens()) == 3 and heard.done().finish == "end"


def test_what_was_read_is_told_by_evidence(make, ids):
    engine = make()
    heard = submit(engine, ids * 2, new=3, evidence=True)
    assert sum(heard.done().blocks) > 0


def test_what_can_never_fit_is_refused_to_the_caller(make, ids):
    engine = make(total_tokens=-1000)
    with pytest.raises(MemoryLimitError, match="expected at most"):
        submit(engine, ids * 3)


def test_a_failing_step_fails_its_requests_alone(make, ids, alone, monkeypatch):
    engine = make()
    extend = engine.runner.extend
    failures = iter([True])

    def fail(rows):
        if next(failures, False):
            raise RuntimeError("a row too many")
        return extend(rows)

    monkeypatch.setattr(engine.runner, "extend", fail)
    done = submit(engine, ids[:50]).done()
    assert (done.finish, done.error) == ("error", "RuntimeError: a row too many")
    assert submit(engine, ids[:50]).tokens() == alone(ids[:50])
    settled(engine)


def test_leaving_finishes_what_runs_and_takes_no_more(make, ids, alone):
    engine = make()
    heard = submit(engine, ids[:400], new=30)
    assert engine.stop(drain=True, timeout_s=60)
    assert heard.tokens() == alone(ids[:400], 30)
    with pytest.raises(EngineStoppedError):
        submit(engine, ids[:10])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_stopped(make, ids, monkeypatch):
    engine = make()
    monkeypatch.setattr(engine.scheduler, "_rows", lambda: 1 / 0)
    done = submit(engine, ids[:50]).done()
    assert done.finish == "error" and "ZeroDivisionError" in done.error
    with pytest.raises(EngineStoppedError):
        submit(engine, ids[:10])
    assert not engine.is_alive
