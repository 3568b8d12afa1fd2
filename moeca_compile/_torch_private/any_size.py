"""Inductor's code for a graph in which one size varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from moeca_compile._torch_private.graphs import compiled_by_inductor, tracing_in
from moeca_compile._torch_private.lookup import Private

_EACH_SIZE = "each batch size is compiled anew"
_SHAPES = Private("torch.fx.experimental.symbolic_shapes.ShapeEnv", _EACH_SIZE)
_DYNAMIC = Private("torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC", _EACH_SIZE)
_FAKE_MODE = Private("torch._subclasses.fake_tensor.FakeTensorMode", _EACH_SIZE)
_SOURCE = Private("torch._dynamo.source.ConstantSource", _EACH_SIZE)


def compile_for_sizes(
    gm: fx.GraphModule, examples: Callable[[Any], Sequence[Tensor]], size: int, eager_random: bool = False
) -> tuple[Callable[..., Any], Callable[[int], bool]]:
    """Inductor's code for a graph whose first input is a size, and whose others are tensors.

    The size must be an input: the guards of code that comes from disk are those on numbers among the inputs alone.

    Args:
        examples: the size -> tensors like the other inputs; it is called with a symbol, in fake mode.
        size: a value of it, at least 2.

    Returns the code, and whether it is right for another value of the size. Raises RuntimeError where this version of
    torch cannot, and whatever Inductor raises.
    """
    if any(each.value is None for each in (_SHAPES, _DYNAMIC, _FAKE_MODE, _SOURCE)):
        raise RuntimeError("this version of torch does not tell how sizes vary")
    shapes, source = _SHAPES.value(), _SOURCE.value("batch")
    symbol = shapes.create_symbol(size, source, _DYNAMIC.value)
    variable = shapes.create_symintnode(symbol, hint=size, source=source)
    mode = _FAKE_MODE.value(allow_non_fake_inputs=True, shape_env=shapes)
    with tracing_in(mode):
        with mode:
            inputs = [variable, *examples(variable)]
        code = compiled_by_inductor(gm, inputs, eager_random=eager_random)

    def holds(value: int) -> bool:
        """Whether nothing that the code was specialized for excludes this size."""
        known = shapes.var_to_range[symbol]
        guards = (guard.expr.xreplace({symbol: value}) for guard in shapes.guards)
        return bool(known.lower <= value <= known.upper) and all(guard == True for guard in guards)  # noqa: E712

    return code, holds
