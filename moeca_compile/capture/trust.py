"""Before a layer's equivalent is used, it is checked against the original method, on random inputs, in eager.

The meaning that is checked is the marker op's (ops/markers.py), as a plain loop: the body of expert 0 with
each expert's own parameters, run on single choices, weighted and summed. Runs once for each class, method,
structure of the experts, numbers that they hold and kind of call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moeca_compile.capture.idioms.base import Dispatch, Facts, Trusted
from moeca_compile.capture.numerics import NoExpertsError, UntrustedError, autocast
from moeca_compile.capture.python_values import held_by_experts
from moeca_compile.ops.exchange import layers_alone

Original = Callable[..., Tensor]
Verdict = Any
"""What the check found out of a trusted dispatch; a str: why it is not trusted; an error: it is none."""

_verdicts: WeakKeyDictionary[type, dict[Any, Verdict]] = WeakKeyDictionary()


def vouch(dispatch: Dispatch, original: Original, module: nn.Module, facts: Facts) -> Trusted:
    """What the equivalent of `original` on `module` needs, for such calls. Raises UntrustedError."""
    layout = dispatch.layout(module)
    verdicts = _verdicts.setdefault(type(module), {})
    values = tuple(held.values for held in held_by_experts(module))
    key = (original, dispatch, layout.structure, values, facts, autocast())
    if key not in verdicts:
        verdicts[key] = _check(dispatch, original, module, facts)
    verdict = verdicts[key]
    if isinstance(verdict, str):
        raise UntrustedError(verdict)
    if isinstance(verdict, NoExpertsError):
        raise NoExpertsError(*verdict.args)
    return layout.paths, verdict


def forget_verdicts() -> None:
    """Forget what was checked, so that it is checked again. For tests."""
    _verdicts.clear()


@contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """For trying a layer out: no gradients, no compilation of experts inside this one, and the random numbers that
    the caller will draw stay the same. No rank talks to another."""
    devices = {tensor.device for tensor in module.parameters() if tensor.device.type == "cuda"}
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(devices),
        layers_alone(UntrustedError),
    ):
        yield


def _check(dispatch: Dispatch, original: Original, module: nn.Module, facts: Facts) -> Verdict:
    """Compare original and meaning; any error of the model's own code on the random rows is a verdict too."""
    with eagerly(module):
        try:
            return dispatch.compared(original, module, facts)
        except UntrustedError as refusal:
            return str(refusal)
        except NoExpertsError as error:
            return NoExpertsError(*error.args)  # without the frames that it was raised in, and their model
        except Exception as error:
            return f"trying it on random rows raised {type(error).__name__}: {error}"
