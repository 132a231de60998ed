"""Decoding by steps that are all alike, so that a GPU replays one recorded graph instead of being told every launch."""

import logging

import torch
from torch import Tensor

from sala.engine.recorded import RecordedStep, why_not_recordable
from sala.engine.sampling import Sampler
from sala.errors import BackendError
from sala.model import MiniCPMSALAForCausalLM, SalaCache
from sala.model.kinds import runs
from sala.model.rows import place_steps
from sala.ops.dispatch import choose, explain
from sala.ops.gpu import exceeds_groups

log = logging.getLogger(__name__)

# where the context is shorter a step's attention is too little to tell
MIN_CAPACITY = 4096


def why_not_capturable(model: MiniCPMSALAForCausalLM) -> str | None:
    """Return why the model's steps cannot be recorded on its device, None when they can."""
    if model.device.type == "cpu":
        return why_not_recordable(model)
    if model.device.type != "cuda":
        return f"the model is on {model.device}; steps are recorded on a GPU or a CPU"
    return why_not_static(model)


def why_not_static(model: MiniCPMSALAForCausalLM) -> str | None:
    """Return which operator of the model's steps would look at numbers on its device, None when none does."""
    config = model.config
    assert config.head_dim is not None and config.num_key_value_heads is not None
    if not runs(config.mixer_types, "infllm"):
        return None
    query_11HK, key_11GK = (
        torch.empty(1, 1, heads, config.head_dim, dtype=model.dtype, device=model.device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    backend = choose("infllm", tensors=(query_11HK, key_11GK)).__name__.rpartition(".")[2]
    if backend == "triton":
        return None
    reason = exceeds_groups((query_11HK, key_11GK)) or explain("infllm", model.device.type)[1]
    return f"block-sparse attention runs through {backend}, which looks at positions ({reason})"


class GraphDecoder:
    """One token after another, each a step that depends on shapes alone: position and token stay on the device.

    A step reads the newest token of `seen_1S` and writes the next behind it. Work is launched for a number of places that
    doubles as the context grows, so that a short one does not pay for all the memory that was reserved. For each such
    number a first step runs as it is, which compiles its kernels; then it is recorded. Without graphs all run as they are.

    seen_1S: int64 (1, S), the tokens so far and room for those to come.
    length: how many there are so far. `cache` has read all but the last, and nobody else uses it until `finish`.
    """

    @torch.inference_mode()
    def __init__(self, model: MiniCPMSALAForCausalLM, cache: SalaCache, seen_1S: Tensor, length: int, sampler: Sampler):
        assert cache.columns == length - 1 > 0
        self.model, self.cache, self.seen_1S, self.length, self.sampler = model, cache, seen_1S, length, sampler
        # the sampler sees all of it, and tokens to come must not count
        seen_1S[:, length:] = seen_1S[:, :1]
        self.position_1 = torch.tensor([length - 1], device=seen_1S.device)
        self.capacity = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.layers: RecordedStep | None = None
        self.records = model.device.type == "cpu" and why_not_recordable(model) is None
        self.recorder = torch.cuda.Stream(seen_1S.device) if seen_1S.is_cuda else None

    @torch.inference_mode()
    def next(self) -> Tensor:
        """Return the next token, int64 (1,), on the device; the step after may overwrite it.

        Raises:
            BackendError: the step cannot be recorded.
        """
        if self.length > self.capacity:
            self._grow()
            run = self._run_aside
        elif self.recorder is None:
            run = self._run
        else:
            self.graph = self.graph or self._record(self.recorder)
            run = self.graph.replay
        with self.cache.step():
            run()
            self.length += 1
        return self.token_1

    def finish(self) -> None:
        """Tell the cache how far it has come: from then on it is as if the model had read the tokens by itself."""
        self.cache.count(self.length - 1)

    def _grow(self) -> None:
        longest = self.seen_1S.shape[1]
        self.capacity = min(longest, max(MIN_CAPACITY, 1 << (self.length - 1).bit_length()))
        # what may move is what has been counted
        self.finish()
        self.cache.hold(self.capacity)
        self.graph = self.layers = None

    def _run(self) -> None:
        hidden_11D = self._through_layers(self.seen_1S.index_select(1, self.position_1))
        self.logits_1X = self.model.logits(hidden_11D)[:, -1]
        self.token_1 = self.sampler.draw(self.seen_1S, self.logits_1X)
        self.position_1 += 1
        self.seen_1S.index_copy_(1, self.position_1, self.token_1[None])

    def _through_layers(self, ids_11: Tensor) -> Tensor:
        if self.layers is not None:
            return self.layers.run(ids_11)
        if self.records:
            try:
                self.layers = RecordedStep(self.model, self.cache, ids_11, self.position_1, self.capacity)
                # recording has run it
                return self.layers.out_B1D
            except BackendError as error:
                self.records = False
                log.info("decoding steps are not recorded: %s", error)
        network = self.model.model
        rows = network.rotated(place_steps(self.position_1, 1, self.capacity, self.cache.tiers))
        return network.run(ids_11, rows, self.cache.of_layers)

    def _run_aside(self) -> None:
        if self.recorder is None:
            return self._run()
        # where it will be recorded, for libraries keep their workspaces by stream
        stream = torch.cuda.current_stream(self.seen_1S.device)
        self.recorder.wait_stream(stream)
        with torch.cuda.stream(self.recorder):
            self._run()
        stream.wait_stream(self.recorder)

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        try:
            graph = torch.cuda.CUDAGraph()
            if not self.sampler.greedy:
                graph.register_generator_state(self.sampler.generator)
            with torch.cuda.device(self.seen_1S.device), torch.cuda.graph(graph, stream=stream):
                self._run()
        except RuntimeError as error:
            # nothing of it has run: what the step would have changed is as it was
            raise BackendError(
                f"a decoding step could not be recorded as a CUDA graph: {str(error).splitlines()[0]}; "
                "decode without one (sala generate --no-graph, graph=False)"
            ) from error
        return graph
