"""The model behind the routes: from a request's fields to choices for the engine, and back to replies."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from sala.engine.answer import AnswerOptions
from sala.engine.engine import Engine
from sala.engine.sampling import Sampling, sampling_for
from sala.serve.answers import Answers, Asking
from sala.serve.documents import Documents
from sala.serve.evidence import passages
from sala.serve.grammar import Grammars
from sala.serve.parse import THINK, AnswerParser
from sala.serve.problem import Problem, body_of
from sala.serve.prompts import Prompt, Prompts
from sala.serve.replies import Choice, Reply, chat_delta, chat_logprobs, chat_message, text_logprobs, usage
from sala.serve.schema import ChatCompletion, Completion, Generate
from sala.serve.settings import Settings

# of a completion whose request does not say; as OpenAI's
COMPLETION_TOKENS = 16
DONE = "data: [DONE]\n\n"
ACCEPTED = ": accepted\n\n"


class Service:
    """One model, its engine, and what the routes need of both."""

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        grammars: Grammars,
        documents: Documents,
        generation: GenerationConfig,
        settings: Settings,
    ):
        self.engine, self.prompts, self.grammars = engine, prompts, grammars
        self.documents, self.generation, self.settings = documents, generation, settings
        self.splits_thoughts = THINK in prompts.tokenizer.get_vocab()

    # from requests to choices

    async def chat_asking(self, body: ChatCompletion) -> list[Asking]:
        self._check_model(body)
        texts = self.documents.texts(body.documents or ())
        tools = None if body.tool_choice == "none" else body.tools
        prompt = await asyncio.to_thread(
            self.prompts.of_messages, body.messages, tools, body.chat_template_kwargs, texts
        )
        grammar = await asyncio.to_thread(self.grammars.of_request, body)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Problem(400, "max_tokens and max_completion_tokens differ; expected one of them", "max_tokens")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        default = self.generation.max_new_tokens or self.settings.max_length - len(prompt.ids)
        options = self._options(body, prompt, limit, default, logprobs)
        return self._choices(prompt, replace(options, grammar=grammar), body)

    async def completion_asking(self, body: Completion) -> list[Asking]:
        self._check_model(body)
        texts = self.documents.texts(body.documents or ())
        given = body.prompts()
        if not given:
            raise Problem(400, "prompt is an empty list; expected at least one prompt", "prompt")
        if body.max_tokens == 0 and not body.echo:
            raise Problem(400, "max_tokens = 0; expected 1 or above, or echo beside it", "max_tokens")
        asking: list[Asking] = []
        for each in given:
            if texts and not isinstance(each, str):
                raise Problem(400, "documents before a prompt of token ids; expected text", "documents")
            prompt = (
                await asyncio.to_thread(self.prompts.of_text, each, texts)
                if isinstance(each, str)
                else self.prompts.of_ids(each)
            )
            options = self._options(body, prompt, body.max_tokens, COMPLETION_TOKENS, body.logprobs)
            whole = body.echo and body.logprobs is not None
            options = replace(options, prompt_logprobs=whole, prompt_only=body.max_tokens == 0)
            asking += self._choices(prompt, options, body)
        return asking

    def _check_model(self, body: Generate) -> None:
        if body.model is not None and body.model != self.settings.name:
            raise Problem(
                404, f"no model {body.model!r} here; expected {self.settings.name!r}", "model", "model_not_found"
            )

    def _options(
        self, body: Generate, prompt: Prompt, limit: int | None, default: int, logprobs: int | None
    ) -> AnswerOptions:
        left = self.settings.max_length - len(prompt.ids)
        if left < 1 or (limit or 0) > left:
            wanted = len(prompt.ids) + max(1, limit or 0)
            raise Problem(
                400,
                f"{len(prompt.ids):,} tokens of prompt and {max(1, limit or 0):,} of answer are {wanted:,}; "
                f"expected at most {self.settings.max_length:,}",
                "prompt" if isinstance(body, Completion) else "messages",
                "context_length_exceeded",
            )
        new = max(1, min(default, left) if limit is None else limit)
        if body.min_tokens > new:
            raise Problem(400, f"min_tokens = {body.min_tokens}; expected at most max_tokens, {new}", "min_tokens")
        vocab_size = self.prompts.vocab_size
        bias = tuple((int(token), amount) for token, amount in (body.logit_bias or {}).items())
        for name, ids in (("logit_bias", [token for token, _ in bias]), ("stop_token_ids", body.stop_token_ids or [])):
            if ids and max(ids) >= vocab_size:
                raise Problem(400, f"{name} names token {max(ids)}; expected 0 to {vocab_size - 1}", name)
        return AnswerOptions(
            self._sampling(body, new, bias),
            logprobs=logprobs,
            ignore_end=body.ignore_eos,
            min_new_tokens=body.min_tokens,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            evidence=body.evidence,
        )

    def _sampling(self, body: Generate, max_new_tokens: int, bias: tuple[tuple[int, float], ...]) -> Sampling:
        top_k = None if body.top_k is None else max(0, body.top_k)
        cuts = {"top_p": body.top_p, "top_k": top_k, "min_p": body.min_p}
        greedy = body.temperature == 0 or (body.temperature is None and not self.generation.do_sample)
        if greedy:
            # the likeliest token is never cut
            cuts = {}
        return sampling_for(
            self.generation,
            **cuts,
            temperature=body.temperature if not body.temperature or body.temperature >= 1e-6 else 0.0,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            seed=None if body.seed is None else body.seed % 2**64,
            max_new_tokens=max_new_tokens,
            stop=body.stops() or None,
        )

    def _choices(self, prompt: Prompt, options: AnswerOptions, body: Generate) -> list[Asking]:
        asking = []
        for number in range(body.n):
            seed = options.sampling.seed
            sampling = replace(options.sampling, seed=None if seed is None else (seed + number) % 2**64)
            asking.append(Asking(prompt, replace(options, sampling=sampling)))
        return asking

    # from choices to replies

    def answers(self, asking: Sequence[Asking]) -> Answers:
        settings = self.settings
        return Answers(self.engine, asking, request_s=settings.request_s, keep_alive_s=settings.keep_alive_s)

    def new_choices(self, body: Generate, asking: Sequence[Asking]) -> list[Choice]:
        choices = []
        for index, each in enumerate(asking):
            parser = None
            if isinstance(body, ChatCompletion):
                names = [] if body.tool_choice == "none" else [tool.function.name for tool in body.tools or ()]
                # an answer of a given form has no thoughts before it
                free = each.options.grammar is None
                parser = AnswerParser(
                    names, thinks=each.prompt.thinks and free, splits_thoughts=self.splits_thoughts and free
                )
            choices.append(Choice(index, each.prompt, parser))
        return choices

    async def whole(self, body: Generate, asking: Sequence[Asking], choices: list[Choice]) -> dict[str, Any]:
        """Return the reply once all choices are over."""
        async with self.answers(asking) as answers:
            async for told in answers.events():
                if told is not None:
                    index, event = told
                    choices[index].take(event)
        reply = Reply.new(
            "chat.completion" if isinstance(body, ChatCompletion) else "text_completion", self.settings.name
        )
        make = self._chat_choice if isinstance(body, ChatCompletion) else self._text_choice
        made = await asyncio.to_thread(lambda: [make(body, each) for each in choices])
        more = await self._more(body, choices)
        return reply.body(made, chunk=False, usage=usage(choices, body.n), **more)

    def _chat_choice(self, body: Any, choice: Choice) -> dict[str, Any]:
        logprobs = chat_logprobs(self.prompts, choice.take_logprobs()) if body.logprobs else None
        return {
            "index": choice.index,
            "message": chat_message(choice),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _text_choice(self, body: Any, choice: Choice) -> dict[str, Any]:
        text = choice.parts.content
        logprobs = None
        first = self._echo(choice) if body.echo else ""
        if body.logprobs is not None:
            logprobs = self._text_logprobs(body, choice, choice.take_logprobs())
        return {
            "index": choice.index,
            "text": first + text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _echo(self, choice: Choice) -> str:
        return choice.prompt.text or self.prompts.text(choice.prompt.ids)

    def _text_logprobs(self, body: Completion, choice: Choice, own: Sequence[Any]) -> dict[str, Any]:
        if not body.echo:
            return text_logprobs(self.prompts, own)
        assert choice.done is not None
        return text_logprobs(self.prompts, [None, *choice.done.prompt_logprobs, *own], choice.prompt.ids[0])

    async def _more(self, body: Generate, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return what a request asked for beyond OpenAI's fields."""
        more: dict[str, Any] = {}
        if body.debug:
            done = [choice.done for choice in choices if choice.done is not None]
            more["prefix"] = [{"cached_tokens": each.cached, "miss": each.miss} for each in done]
        if body.evidence:
            named = self.documents.named(body.documents or ())
            block_size = self.engine.runner.config.sparse_geometry.block_size
            more["evidence"] = await asyncio.to_thread(
                lambda: [passages(self.prompts, choice, named, block_size) for choice in choices]
            )
        return more

    async def stream(self, body: Generate, asking: Sequence[Asking], choices: list[Choice]) -> AsyncIterator[str]:
        """Yield server-sent events: `ACCEPTED`, chunks as text comes, the usage if asked for, and the end mark.

        Raises:
            SalaError: in place of the first event, where the engine does not take the request.
        """
        chat = isinstance(body, ChatCompletion)
        reply = Reply.new("chat.completion" if chat else "text_completion", self.settings.name)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        blank = {"usage": None} if wants_usage else {}
        begun: set[int] = set()

        def line(made: list[dict[str, Any]], **more: Any) -> str:
            return _event(reply.body(made, chunk=True, **{**blank, **more}))

        try:
            async with self.answers(asking) as answers:
                # for the caller, who then knows that the engine has taken it: before, an error is an HTTP status
                yield ACCEPTED
                said_s = time.monotonic()
                async for told in answers.events():
                    if time.monotonic() - said_s >= self.settings.keep_alive_s:
                        # also while a long prompt is read, of which there is much to hear and nothing to say
                        said_s = time.monotonic()
                        yield ": keep-alive\n\n"
                    if told is None:
                        continue
                    index, event = told
                    choice = choices[index]
                    new = choice.take(event)
                    if chat and index not in begun:
                        begun.add(index)
                        yield line([_chunk(index, {"role": "assistant", "content": ""})])
                    made = self._chat_chunk(body, choice, new) if chat else self._text_chunk(body, choice, new, begun)
                    if made is not None:
                        yield line([made])
            more = await self._more(body, choices)
            if more:
                yield line([], **more)
            if wants_usage:
                yield _event(reply.body([], chunk=True, usage=usage(choices, body.n)))
        except Problem as problem:
            yield _event(body_of(problem.status, problem.message, problem.param, problem.code))
        yield DONE

    def _chat_chunk(self, body: Any, choice: Choice, new: Any) -> dict[str, Any] | None:
        if not new and choice.done is None:
            return None
        chunk = _chunk(choice.index, chat_delta(new), choice.finish_reason if choice.done else None)
        if body.logprobs and choice.logprobs:
            chunk["logprobs"] = chat_logprobs(self.prompts, choice.take_logprobs())
        return chunk

    def _text_chunk(self, body: Any, choice: Choice, new: Any, begun: set[int]) -> dict[str, Any] | None:
        text = new.content
        echoes = body.echo and body.logprobs is None and choice.index not in begun
        if echoes:
            begun.add(choice.index)
            text = self._echo(choice) + text
        # with both, the prompt's log-probabilities come at the end, and so does all else
        if (body.echo and body.logprobs is not None and choice.done is None) or (not text and choice.done is None):
            return None
        if body.echo and body.logprobs is not None:
            return self._text_choice(body, choice)
        logprobs = None
        if body.logprobs is not None and choice.logprobs:
            logprobs = text_logprobs(self.prompts, choice.take_logprobs())
        finish = choice.finish_reason if choice.done else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
