"""The report: what was found, cached, spent and saved."""

from moeca_compile.reporting.report import Flops, GraphBreak, Region, Report

__all__ = ["Flops", "GraphBreak", "Region", "Report"]
