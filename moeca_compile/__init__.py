"""Faster sampling from DiT-MoE models: `torch.compile(model, backend="moeca", options={"recipe": "moeca"})`.

Importing the package makes the backend's name known, patches nothing and loads no compiler: each public name is
loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeca_compile import entry_point

if TYPE_CHECKING:
    from moeca_compile.backend import moeca_backend as moeca_backend
    from moeca_compile.config import MoecaConfig as MoecaConfig
    from moeca_compile.options import ConfigError as ConfigError
    from moeca_compile.pipelines.enable import disable as disable
    from moeca_compile.pipelines.enable import enable as enable
    from moeca_compile.reporting.collect import report as report
    from moeca_compile.reporting.collect import reset as reset
    from moeca_compile.reporting.report import Report as Report
    from moeca_compile.reporting.traced import trace as trace
    from moeca_compile.runtime.scope import generation as generation
    from moeca_compile.runtime.scope import step as step
    from moeca_compile.runtime.scope import stream as stream
    from moeca_compile.tuning.tune import tune as tune
    from moeca_compile.tuning.tuned import Tuned as Tuned

_MODULES = {
    "ConfigError": "options",
    "MoecaConfig": "config",
    "Report": "reporting.report",
    "Tuned": "tuning.tuned",
    "disable": "pipelines.enable",
    "enable": "pipelines.enable",
    "generation": "runtime.scope",
    "moeca_backend": "backend",
    "report": "reporting.collect",
    "reset": "reporting.collect",
    "step": "runtime.scope",
    "stream": "runtime.scope",
    "trace": "reporting.traced",
    "tune": "tuning.tune",
}
"""The module of each public name."""

__version__ = "0.1.0"
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


entry_point.provide(__version__)
