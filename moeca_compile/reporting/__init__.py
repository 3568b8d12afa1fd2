"""What a compiled model can say of itself."""

from .report import Flops, GraphBreak, Region, Report

__all__ = ["Flops", "GraphBreak", "Region", "Report"]
