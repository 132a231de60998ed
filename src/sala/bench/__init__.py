"""Benchmarks: what a model costs. Time to first token and memory against length, and where they were measured."""

from sala.bench.environment import environment
from sala.bench.latency import LatencyPoint, latency
from sala.bench.memory import PeakMemory, peak_memory

__all__ = ["LatencyPoint", "PeakMemory", "environment", "latency", "peak_memory"]
