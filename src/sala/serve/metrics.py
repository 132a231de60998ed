"""Numbers for Prometheus: the engine's counts, and how long requests take."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sala.engine.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """One registry a server, so that two in one process do not meet."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "sala_http_requests", "HTTP requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.duration = Histogram(
            "sala_http_request_seconds",
            "From a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        status = self.engine.status()
        gauges = {
            "sala_requests_running": ("Requests that are read or answered.", status.running),
            "sala_requests_waiting": ("Requests in the queue.", status.waiting),
            "sala_prefixes_kept": ("Prefixes whose states are kept.", status.kept_prefixes),
            "sala_prefix_bytes": ("Memory of kept prefixes.", status.kept_bytes),
            "sala_running_bytes": ("Memory set aside for running requests.", status.running_bytes),
            "sala_cache_bytes": ("Memory for both.", status.total_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counters = {
            "sala_prompt_tokens": ("Tokens of prompts.", status.prompt_tokens),
            "sala_cached_tokens": ("Of those, tokens found in kept prefixes.", status.cached_tokens),
            "sala_generated_tokens": ("Tokens of answers.", status.new_tokens),
            "sala_preemptions": ("Requests that had to make way.", status.preemptions),
            "sala_evictions": ("Prefixes that had to make way.", status.evictions),
            "sala_steps": ("Passes of the model.", status.steps),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
        finished = CounterMetricFamily("sala_requests_finished", "Answers by how they ended.", labels=["reason"])
        for reason, count in status.finished.items():
            finished.add_metric([reason], count)
        yield finished
        misses = CounterMetricFamily(
            "sala_prefix_misses", "Prompts of which not all was found, by why.", labels=["why"]
        )
        for why, count in status.misses.items():
            misses.add_metric([why], count)
        yield misses

    def text(self) -> bytes:
        return generate_latest(self.registry)
