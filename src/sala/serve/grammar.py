"""Answers that are JSON of a given schema, token by token (llguidance)."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sala.engine.answer import Grammar
from sala.serve.problem import Problem
from sala.serve.schema import ChatCompletion, NamedTool, Tool


class JsonGrammar:
    """Which tokens may come next in an answer that has to be of a grammar."""

    def __init__(self, tokens: LLTokenizer, grammar: str, vocab_size: int, device: torch.device):
        self.matcher = LLMatcher(tokens, grammar)
        self.vocab_size, self.device = vocab_size, device
        self.mask = allocate_token_bitmask(1, vocab_size)
        self.bits = torch.arange(32, dtype=torch.int32)

    def forbidden_1X(self) -> Tensor:
        fill_next_token_bitmask(self.matcher, self.mask)
        allowed = (self.mask[:, :, None] >> self.bits) & 1
        return (allowed.flatten(1)[:, : self.vocab_size] == 0).to(self.device)

    def take(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take token {token}: {self.matcher.get_error()}")


class Grammars:
    """Makes grammars for one tokenizer, which is prepared when the first is asked for."""

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int], vocab_size: int, device: torch.device):
        self.tokenizer, self.end_tokens = tokenizer, list(end_tokens)
        self.vocab_size, self.device = vocab_size, device
        self._tokens: LLTokenizer | None = None

    def of_schema(self, schema: dict[str, Any], field: str) -> Callable[[], Grammar]:
        """Return what makes a grammar for one answer; an unknown or impossible schema is refused by the field's name."""
        if self._tokens is None:
            if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
                raise Problem(
                    400, f"{field}: this model's tokenizer has no tokenizer.json; expected it left out", field
                )
            self._tokens = from_tokenizer(self.tokenizer, self.vocab_size, self.end_tokens or None)
        tokens = self._tokens
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
            wrong = LLMatcher.validate_grammar(grammar, tokens)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise Problem(400, f"{field}: {' '.join(wrong.split())}; expected a JSON schema that can be met", field)
        return lambda: JsonGrammar(tokens, grammar, self.vocab_size, self.device)

    def of_request(self, body: ChatCompletion) -> Callable[[], Grammar] | None:
        """Return the grammar that a request asks for, None for free text."""
        if body.forces_tool():
            chosen = [tool for tool in body.tools or () if _is_chosen(tool, body.tool_choice)]
            return self.of_schema({"anyOf": [_call_schema(tool) for tool in chosen]}, "tool_choice")
        wanted = body.response_format
        if wanted is None or wanted.type == "text":
            return None
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        return self.of_schema(schema, "response_format")


def _is_chosen(tool: Tool, choice: Any) -> bool:
    return not isinstance(choice, NamedTool) or tool.function.name == choice.function.name


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": tool.function.parameters or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
