"""`moeca tune`: options for the user's model and sampling loop, found by measuring, in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeca_compile.command.named import CommandError, called, function_named, raised
from moeca_compile.tuning.search import NothingCachedError
from moeca_compile.tuning.tune import tune

NO_MODEL = "{0} returned a {1}. Let it return the model, an nn.Module"
NO_PLACE = "{0!r}: name a .json file in a folder that exists"


def tuned(factory: str, sample: str, out: str, wish: Mapping[str, Any], **arguments: Any) -> str:
    """Tune the model that `factory` makes, save the outcome to `out`, and say what was found.

    Args:
        wish, arguments: those of `moeca_compile.tune`.

    Raises CommandError where a name leads nowhere, a function of the user's raises, or nothing can be tuned.
    """
    where = Path(out).expanduser()
    if where.suffix != ".json" or not where.parent.is_dir() or where.is_dir():
        raise CommandError(NO_PLACE.format(out))
    loop, made = function_named(sample), called(factory)
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise CommandError(NO_MODEL.format(factory, type(model).__name__))

    def one(model: Any, seed: int) -> Tensor:
        try:
            found: Tensor = loop(model, seed)
        except Exception as error:
            raise CommandError(f"{sample} {raised(error)}") from error
        return found

    try:
        found = tune(model.eval(), one, **wish, **arguments)
        found.save(where)
    except (ValueError, OSError, NothingCachedError) as error:
        raise CommandError(str(error)) from error
    return f"{found}\nwrote {where}"
