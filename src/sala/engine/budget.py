"""How much memory the caches of an engine may take, before its model is loaded."""

from sala.engine.load import Checkpoint
from sala.engine.memory import available_bytes, estimate, human_bytes
from sala.engine.runner import page_tokens
from sala.errors import MemoryLimitError
from sala.model.report import cache_bytes, num_parameters

# of what is free after weights and work, so much is left for texts, tokens and everything else
SPARE = 0.1


def plan_cache(checkpoint: Checkpoint, chunk: int, wanted: int | None = None) -> int:
    """Return the bytes for caches: those asked for, or what is left beside weights and work.

    Raises:
        MemoryLimitError: the weights do not fit, or more is asked for than is left.
    """
    config, itemsize = checkpoint.config, checkpoint.dtype.itemsize
    need = estimate(config, checkpoint.dtype, chunk, chunk, num_parameters(config), checkpoint.device.type)
    available = available_bytes(checkpoint.device)
    left = max(0, int((available - need.weights - need.working) * (1 - SPARE)))
    least = cache_bytes(config, page_tokens(config), itemsize)
    planned = left if wanted is None else wanted
    if not least <= planned <= left:
        raise MemoryLimitError(
            f"{human_bytes(planned)} of cache; {human_bytes(available)} are available, of which weights take "
            f"{human_bytes(need.weights)} and work {human_bytes(need.working)}; expected {human_bytes(least)} to "
            f"{human_bytes(left)}"
        )
    return planned
