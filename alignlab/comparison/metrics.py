"""Moved to `comparison.report`."""

from alignlab.comparison.report.metrics import METRICS, MISSING, format_number, metric  # noqa: F401
