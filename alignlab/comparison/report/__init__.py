"""From per-run metrics to a leaderboard, its files, and the report with its plots."""

from alignlab.comparison.report.leaderboard import Leaderboard, build
from alignlab.comparison.report.metrics import METRICS, MISSING, format_number
from alignlab.comparison.report.page import render_page, write_report
from alignlab.comparison.report.plots import Plot
from alignlab.comparison.report.tables import Cell, Table, csv_text, plain

__all__ = [
    "METRICS",
    "MISSING",
    "Cell",
    "Leaderboard",
    "Plot",
    "Table",
    "build",
    "csv_text",
    "format_number",
    "plain",
    "render_page",
    "write_report",
]
