"""Measured proof that a bundle is as good as its float reference, and how fast it is."""

from __future__ import annotations

from quantempo.report.measure import ReportOptions
from quantempo.report.write import ReportSummary, write_report

__all__ = ["ReportOptions", "ReportSummary", "write_report"]
