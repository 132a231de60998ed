"""A conversation of many turns, as token ids that each begin with those of the turn before."""

from transformers import PreTrainedTokenizerBase

from sala.data.chat import ChatTemplate, TemplateRefusal
from sala.data.text import around
from sala.engine.prompt import encode_prompt, join
from sala.errors import InputError


class Conversation:
    """Questions and answers about a document, in the tokenizer's chat template where it has one, else as plain text.

    Raises:
        InputError: a system message for a model without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, document: str = "", system: str = ""):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.document, self.system = document, system
        self.template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        if system and self.template is None:
            raise InputError("a system message for a model without a chat template; expected none")
        self.clear()

    def clear(self) -> None:
        """Forget all turns; the document stays."""
        self.turns: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.text = self.document

    def ask(self, question: str) -> list[int]:
        """Add a question and return the prompt for its answer."""
        if self.template is None:
            self.text = join(self.text, question)
            return encode_prompt(self.tokenizer, self.text, self.vocab_size)
        first = not any(turn["role"] == "user" for turn in self.turns)
        self.turns.append({"role": "user", "content": join(self.document, question) if first else question})
        try:
            ids = self.template.encoder.encode(self.template.ask(self.turns).text)
        except TemplateRefusal as refusal:
            raise InputError(f"the chat template refuses the conversation: {refusal}") from refusal
        begin, _ = around(self.tokenizer)
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def answered(self, answer: str) -> None:
        """Add the answer to the last question."""
        self.text += answer
        self.turns.append({"role": "assistant", "content": answer})
