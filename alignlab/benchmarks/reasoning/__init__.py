"""The reasoning benchmark: arithmetic in several steps, each of which a program checks."""

from alignlab.benchmarks.reasoning.benchmark import ReasoningBenchmark
from alignlab.benchmarks.reasoning.problems import Teacher, TeacherSettings, check_steps, is_right

__all__ = ["ReasoningBenchmark", "Teacher", "TeacherSettings", "check_steps", "is_right"]
