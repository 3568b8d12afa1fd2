"""Inductor's code for a graph in which sizes vary."""

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
    gm: fx.GraphModule,
    examples: Callable[[Sequence[Any]], Sequence[Tensor]],
    sizes: Sequence[int],
    eager_random: bool = False,
) -> tuple[Callable[..., Any], Callable[[Sequence[int]], bool]]:
    """Inductor's code for a graph whose first inputs are sizes, and whose others are tensors.

    Sizes must be inputs: the guards of code that comes from disk are those on numbers among the inputs alone.

    Args:
        examples: the sizes -> tensors like the other inputs; it is called with symbols, in fake mode.
        sizes: values of them, each at least 2.

    Returns the code, and whether it is right for other values of the sizes. Raises RuntimeError where this version of
    torch cannot, and whatever Inductor raises.
    """
    if any(each.value is None for each in (_SHAPES, _DYNAMIC, _FAKE_MODE, _SOURCE)):
        raise RuntimeError("this version of torch does not tell how sizes vary")
    shapes = _SHAPES.value()
    sources = [_SOURCE.value(f"size_{i}") for i in range(len(sizes))]
    symbols = [shapes.create_symbol(*pair, _DYNAMIC.value) for pair in zip(sizes, sources, strict=True)]
    given = zip(symbols, sizes, sources, strict=True)
    variables = [shapes.create_symintnode(symbol, hint=size, source=source) for symbol, size, source in given]
    mode = _FAKE_MODE.value(allow_non_fake_inputs=True, shape_env=shapes)
    with tracing_in(mode):
        with mode:
            inputs = [*variables, *examples(variables)]
        code = compiled_by_inductor(gm, inputs, eager_random=eager_random)

    def holds(values: Sequence[int]) -> bool:
        """Whether nothing that the code was specialized for excludes these sizes."""
        at = dict(zip(symbols, values, strict=True))
        known = [(shapes.var_to_range[symbol], value) for symbol, value in at.items()]
        guards = (guard.expr.xreplace(at) for guard in shapes.guards)
        within = all(bool(span.lower <= value <= span.upper) for span, value in known)
        return within and all(guard == True for guard in guards)  # noqa: E712

    return code, holds
