"""The engine: one thread that runs requests step by step, and what other threads ask of it."""

import copy
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from sala.engine.answer import Answer, AnswerOptions, TokenLogprob, token_logprobs
from sala.engine.events import Asked, Done, EngineStoppedError, OnEvent, Piece, Progress, Started, Status
from sala.engine.pages import Budget, PagePool, PrefixTree, digests
from sala.engine.request import Finish, Request
from sala.engine.runner import SLOTS, Extended, Extension, Runner, States
from sala.engine.sampling import NO_TOKEN
from sala.engine.saved import SavedDocument, gather, scatter
from sala.engine.scheduler import Row, Scheduler, Step
from sala.errors import SalaError

log = logging.getLogger(__name__)


@dataclass
class _Job:
    answer: Answer
    on_event: OnEvent
    prompt_logprobs: list[TokenLogprob]


class Engine:
    """Runs requests on a runner. `submit` and `cancel` may be called by any thread; events come from the engine's own.

    chunk, max_waiting: as in `Scheduler`. keep: whether prefixes are kept at all.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        *,
        chunk: int = 512,
        max_waiting: int = 1024,
        keep: bool = True,
    ):
        self.runner, self.end_tokens, self.keep = runner, end_tokens, keep
        # tokenizers keep settings while they work: other threads have their own
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tree = PrefixTree(runner.page_size, PagePool(runner.num_pages))
        self.budget = Budget(runner.budget_bytes, runner.page_bytes, SLOTS * runner.state_bytes, self.tree)
        self.scheduler = Scheduler(
            self.budget, self.tree, chunk=chunk, max_running=runner.max_running, max_waiting=max_waiting
        )
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._counts = {"prompt": 0, "cached": 0, "new": 0, "steps": 0}
        self._finished: dict[str, int] = {}
        self._misses: dict[str, int] = {}
        self._leaving: Literal["", "drain", "now"] = ""
        self._thread = threading.Thread(target=self._run, name="sala-engine", daemon=True)

    # what other threads call

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, finish those there are or cancel them, and wait; False when time ran out before."""
        self._call(lambda: self._leave("drain" if drain else "now"))
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._call(lambda: self._leave("now"))
            return False
        return True

    def submit(
        self,
        prompt: Sequence[int],
        options: AnswerOptions,
        on_event: OnEvent,
        *,
        ends: Sequence[int] = (),
    ) -> str:
        """Queue a prompt and return the request's name, for `cancel`; as `submit_all`."""
        return self.submit_all([Asked(tuple(prompt), options, on_event, tuple(ends))])[0]

    def submit_all(self, asked: Sequence[Asked]) -> list[str]:
        """Queue requests in order, all of them or none, and return their names.

        Raises:
            MemoryLimitError: one can never fit.
            QueueFullError: too many wait.
            EngineStoppedError: the engine is leaving.
        """
        requests = [self._request(each) for each in asked]
        self.ask(lambda: self._take_all(requests))
        return [request.id for request in requests]

    def _request(self, asked: Asked) -> Request:
        options = asked.options
        answer = Answer(options, self.tokenizer, self.end_tokens, self.runner.model.device, asked.prompt)
        return Request(
            f"request-{next(self._numbers)}",
            asked.prompt,
            0 if options.prompt_only else options.sampling.max_new_tokens,
            self.runner.page_size,
            ends=asked.ends,
            whole=options.prompt_logprobs,
            payload=_Job(answer, asked.on_event, []),
        )

    def cancel(self, name: str) -> None:
        """Stop a request before the next step; nothing happens where it is over."""
        self._call(lambda: self._cancel(name))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> Status:
        return self.ask(self._status)

    def adopt(self, document: SavedDocument) -> bool:
        """Keep a saved document as a prefix for whoever asks about it; False where memory is short."""
        return bool(self.ask(lambda: self._adopt(document)))

    def exported(self, prompt: Sequence[int], text: str) -> SavedDocument | None:
        """Return what is kept of a prompt, under the text it is from; None where nothing is."""
        document = self.ask(lambda: self._exported(tuple(prompt), text))
        return cast(SavedDocument | None, document)

    def ask(self, question: Callable[[], Any]) -> Any:
        """Return what a function returns that runs in the engine's thread, between two steps."""
        future: Future[Any] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

        self._call(answer)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise EngineStoppedError("the engine has stopped; expected a running one") from None

    def _call(self, function: Callable[[], None]) -> None:
        self._calls.put(function)

    # the engine's thread

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            # a mistake of ours: nobody may wait for what will not come
            for request in list(self._requests.values()):
                request.finish = "error"
                self._end(request, f"the engine has stopped: {type(error).__name__}: {error}")
            raise

    def _work(self) -> None:
        while not (self._leaving and self.scheduler.is_idle):
            self._hear()
            if not self.scheduler.is_idle:
                self._step(self.scheduler.plan())

    def _hear(self) -> None:
        """Do what other threads ask; with nothing to run, wait for the first."""
        if self.scheduler.is_idle:
            self._calls.get()()
        while not self._calls.empty():
            self._calls.get()()

    def _leave(self, how: Literal["drain", "now"]) -> None:
        self._leaving = how
        if how == "now":
            for request in self._requests.values():
                request.cancelled = True

    def _take_all(self, requests: Sequence[Request]) -> None:
        if self._leaving:
            raise EngineStoppedError("the server is shutting down; expected another try later")
        try:
            for request in requests:
                self.scheduler.submit(request)
        except SalaError:
            for request in requests:
                if request in self.scheduler.waiting:
                    self.scheduler.waiting.remove(request)
            raise
        for request in requests:
            self._requests[request.id] = request
            self._counts["prompt"] += len(request.prompt)

    def _cancel(self, name: str) -> None:
        request = self._requests.get(name)
        if request is not None:
            request.cancelled = True

    def _status(self) -> Status:
        return Status(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kept_prefixes=len(self.tree),
            kept_bytes=self.budget.used_bytes - self.budget.running_bytes,
            running_bytes=self.budget.running_bytes,
            total_bytes=self.budget.total_bytes,
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self._counts["cached"],
            new_tokens=self._counts["new"],
            preemptions=self.scheduler.preemptions,
            evictions=self.tree.evictions,
            steps=self._counts["steps"],
            finished=dict(self._finished),
            misses=dict(self._misses),
        )

    @torch.inference_mode()
    def _step(self, step: Step) -> None:
        for request in step.stopped:
            self._stop(request)
        for request in [request for request in self._requests.values() if request.finish == "cancelled"]:
            self._end(request)
        for request in step.started:
            self._start(request)
        if not step.rows:
            return
        self._counts["steps"] += 1
        try:
            results = self.runner.extend([self._extension(row) for row in step.rows])
        except Exception as error:  # of whatever kind: the requests of this step fail, the engine goes on
            log.exception("a step of %d rows failed", len(step.rows))
            for row in step.rows:
                self._fail(row.request, f"{type(error).__name__}: {error}")
            return
        for row, result in zip(step.rows, results, strict=True):
            try:
                self._advance(row, result)
            except Exception as error:  # as above, for one request alone
                log.exception("%s failed", row.request.id)
                self._fail(row.request, f"{type(error).__name__}: {error}")

    def _start(self, request: Request) -> None:
        if request.states is None:
            request.sequence = self.runner.open(request.places)
        else:
            request.sequence = self.runner.restore(request.places, request.states)
            request.states = None
        if not request.preemptions:
            self._counts["cached"] += request.cached
            if request.miss:
                # the reason without its place in the text
                why = request.miss.partition(" from token")[0]
                self._misses[why] = self._misses.get(why, 0) + 1
            log.info(
                "%s: %d tokens, %d found%s", request.id, len(request.prompt), request.cached, _because(request.miss)
            )
            request.payload.on_event(Started(request.cached, request.miss))

    def _extension(self, row: Row) -> Extension:
        options = row.request.payload.answer.options
        at_end = row.request.read + len(row.tokens) == row.request.length
        return Extension(row.request.sequence, row.tokens, row.request.whole, options.evidence and at_end)

    def _advance(self, row: Row, result: Extended) -> None:
        request, job = row.request, row.request.payload
        start = request.read
        request.read += len(row.tokens)
        request.tokens_per_s = len(row.tokens) / result.seconds
        self._keep_on_the_way(request)
        if request.whole and start < len(request.prompt):
            self._tell_prompt(request, start, result)
        if request.read < request.length:
            job.on_event(Progress(request.read, len(request.prompt)))
            return
        if start < len(request.prompt):
            job.on_event(Progress(len(request.prompt), len(request.prompt)))
        answer: Answer = job.answer
        answer.watch(result.blocks_N)
        if request.max_new_tokens == 0:
            self._finish(request, "length")
            return
        token = answer.draw(request.output, result.logits_NX[-1:])
        if token == NO_TOKEN:
            self._fail(request, "the logits are not finite")
            return
        self._counts["new"] += 1
        before = len(request.output)
        text = answer.take(request.output, token)
        logprobs, answer.logprobs = tuple(answer.logprobs), []
        tokens = tuple(request.output[before:])
        if text or tokens:
            job.on_event(Piece(text, tokens, logprobs if tokens else ()))
        if answer.finish is not None:
            self._finish(request, answer.finish)

    def _tell_prompt(self, request: Request, start: int, result: Extended) -> None:
        """Note the log-probabilities of the tokens of the prompt that follow those just read."""
        following = request.prompt[start + 1 : request.read + 1]
        top = request.payload.answer.options.logprobs or 0
        request.payload.prompt_logprobs += token_logprobs(result.logits_NX[: len(following)], following, top)

    # prefixes

    def _keep_on_the_way(self, request: Request) -> None:
        """Keep the states where the prompt says; inside the answer, remember those of the last full page."""
        if not self.keep or request.read % self.runner.page_size:
            return
        if request.read in request.stops:
            self._keep(request, self.runner.states(request.sequence))
        elif request.read > len(request.prompt):
            request.mark = self.runner.states(request.sequence)

    def _keep(self, request: Request, states: States) -> None:
        """Make a prefix of a running request available to others, where memory allows."""
        pages = request.page_digests()[: states.length // self.runner.page_size]
        if not self.budget.make_room(0, states.size_bytes):
            return
        node = self.tree.find(pages[-1])
        if node is not None:
            self.tree.renew(node, states)
            return
        parent = self.tree.deepest(pages)
        start = 0 if parent is None else parent.length
        places = request.places[start // self.runner.page_size : len(pages)]
        self.tree.add(request.slice(start, states.length), pages, places, states)

    def _adopt(self, document: SavedDocument) -> bool:
        pages = digests(document.ids, self.runner.page_size)
        node = self.tree.find(pages[-1])
        if node is not None:
            self.tree.renew(node, document.states)
            return True
        if not self.budget.make_room(len(pages), document.states.size_bytes):
            return False
        places = self.tree.pool.take(len(pages))
        scatter(self.runner.cache, places, document.keys)
        parent = self.tree.deepest(pages)
        start = 0 if parent is None else parent.length
        self.tree.add(document.ids[start:], pages, places[start // self.runner.page_size :], document.states)
        # those that the parent has already are free again
        self.tree.pool.stop(places)
        return True

    def _exported(self, prompt: tuple[int, ...], text: str) -> SavedDocument | None:
        node = self.tree.match(len(prompt), digests(prompt, self.runner.page_size)).node
        if node is None:
            return None
        self.tree.touch(node)
        keys = gather(self.runner.cache, node.all_places())
        return SavedDocument(text, prompt[: node.length], keys, cast(States, node.states))

    # ends

    def _stop(self, request: Request) -> None:
        """Free the sequence of a cancelled or preempted request."""
        if request.finish == "cancelled" and self.keep:
            if request.is_reading and request.read and request.read % self.runner.page_size == 0:
                # whoever asks again goes on from here
                request.mark = self.runner.states(request.sequence)
            self._free(request)
            return
        # read again from its start, it tells all of its prompt again
        request.payload.prompt_logprobs.clear()
        request.mark = None
        self._free(request)

    def _finish(self, request: Request, finish: Finish) -> None:
        self.scheduler.end(request, finish)
        self._free(request)
        self._end(request)

    def _fail(self, request: Request, why: str) -> None:
        request.mark = None
        self.scheduler.end(request, "error")
        self._free(request)
        self._end(request, why)

    def _free(self, request: Request) -> None:
        """Free a sequence, keeping its prefix up to the mark."""
        if request.mark is not None:
            self._keep(request, request.mark)
        self.runner.free(request.sequence)
        if request.finish is not None:
            self.scheduler.release(request)
        request.sequence = request.mark = None

    def _end(self, request: Request, error: str = "") -> None:
        del self._requests[request.id]
        finish = request.finish
        assert finish is not None
        self._finished[finish] = self._finished.get(finish, 0) + 1
        blocks_N = request.payload.answer.blocks_N
        request.payload.on_event(
            Done(
                finish,
                new_tokens=len(request.output) + (finish == "end"),
                prompt_tokens=len(request.prompt),
                cached=request.cached,
                miss=request.miss,
                prompt_logprobs=tuple(request.payload.prompt_logprobs),
                blocks=() if blocks_N is None else tuple(blocks_N.tolist()),
                error=error,
            )
        )


def _because(miss: str) -> str:
    return f" ({miss})" if miss else ""
