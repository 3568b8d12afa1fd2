"""What a compiled model can say of itself."""

from moeca_compile.reporting.report import Flops, GraphBreak, Region, Report

__all__ = ["Flops", "GraphBreak", "Region", "Report"]
