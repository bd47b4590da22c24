"""What policies are measured on. A benchmark is any class with the methods of `core.Benchmark`, named in the config by
`benchmark._target_`; `Benchmark` is a base class with defaults, `measure` does what most of them do."""

from alignlab.benchmarks.base import Benchmark, Subject, measure

__all__ = ["Benchmark", "Subject", "measure"]
