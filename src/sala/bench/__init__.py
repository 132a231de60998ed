"""Benchmarks: what operators, models and training cost. Time and memory against length, and where they were measured."""

from sala.bench.batch import BatchPlan, run_batch
from sala.bench.environment import environment
from sala.bench.failures import MeasurementError
from sala.bench.latency import LatencyPoint, latency
from sala.bench.length import length_label, parse_length
from sala.bench.memory import PeakMemory, peak_memory
from sala.bench.ops import OpsPlan, ParityError, run_ops
from sala.bench.pair import LatencyPlan, run_latency
from sala.bench.report import write_report
from sala.bench.results import write_results
from sala.bench.train import TrainPlan, run_train
from sala.bench.weights import WeightsPlan, run_weights

__all__ = [
    "BatchPlan",
    "LatencyPlan",
    "LatencyPoint",
    "MeasurementError",
    "OpsPlan",
    "ParityError",
    "PeakMemory",
    "TrainPlan",
    "WeightsPlan",
    "environment",
    "latency",
    "length_label",
    "parse_length",
    "peak_memory",
    "run_batch",
    "run_latency",
    "run_ops",
    "run_train",
    "run_weights",
    "write_report",
    "write_results",
]
