"""Faster sampling from DiT-MoE models: `torch.compile(model, backend="moeca", options={"recipe": "moeca"})`."""

from moeca_compile.backend import moeca_backend
from moeca_compile.config import ConfigError, MoecaConfig
from moeca_compile.reporting.collect import report, reset
from moeca_compile.reporting.report import Report
from moeca_compile.runtime.scope import generation, step, stream

__all__ = [
    "ConfigError",
    "MoecaConfig",
    "Report",
    "generation",
    "moeca_backend",
    "report",
    "reset",
    "step",
    "stream",
]
