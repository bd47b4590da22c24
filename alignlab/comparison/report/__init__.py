"""From per-run metrics to a leaderboard, its files, and the report with its plots."""

from alignlab.comparison.report.leaderboard import Leaderboard, build, load
from alignlab.comparison.report.metrics import METRICS, MISSING, Metric, format_number, metric
from alignlab.comparison.report.page import Cell, Heading, Table, render_page, write_report
from alignlab.comparison.report.plots import Plot

__all__ = [
    "METRICS",
    "MISSING",
    "Cell",
    "Heading",
    "Leaderboard",
    "Metric",
    "Plot",
    "Table",
    "build",
    "format_number",
    "load",
    "metric",
    "render_page",
    "write_report",
]
