"""Running a model: what it reads, how it answers, and whether that fits into memory."""

from sala.engine.generate import Generation, Statistics, generate
from sala.engine.load import Checkpoint, load, open_checkpoint
from sala.engine.memory import Need, available_bytes, check_memory, human_bytes
from sala.engine.prompt import Documents, encode_prompt, join, read_documents
from sala.engine.reading import DEFAULT_CHUNK, logits_at, read
from sala.engine.sampling import Sampling, sampling_for
from sala.engine.saved import open_cache, saved_text

__all__ = [
    "DEFAULT_CHUNK",
    "Checkpoint",
    "Documents",
    "Generation",
    "Need",
    "Sampling",
    "Statistics",
    "available_bytes",
    "check_memory",
    "encode_prompt",
    "generate",
    "human_bytes",
    "join",
    "load",
    "logits_at",
    "open_cache",
    "open_checkpoint",
    "read",
    "read_documents",
    "sampling_for",
    "saved_text",
]
