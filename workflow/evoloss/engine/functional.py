"""A model as a function of its parameters, and what a model has beside its layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


class FunctionalModel:
    """Calls a model with other parameters than its own, those that are shared among layers too.

    Of a model that has one module in two places, `torch.func.functional_call` left the given parameters in it (torch
    2.13), because it ties all names of a parameter; here every module is given its parameters once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        first_names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._sources = {
            f"{path}.{name}" if path else name: first_names[id(parameter)]
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the outputs; ``params`` by the names of ``model.named_parameters()``, or the model's own."""
        named = {name: params[source] for name, source in self._sources.items() if source in params}
        outputs: Tensor = functional_call(self._model, named, (x,), tie_weights=False)
        return outputs


def find_addition(model: nn.Module) -> str | None:
    """Return what the layers of a model do not tell, so that it has to be called to know; None without any.

    A path that reads the layers off a model, and computes with them itself, would leave it out.
    """
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        what = f"{type(module).__name__} {path or '(the model)'}"
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            return f"{what} has a hook"
        if "forward" in vars(module):
            return f"{what} has a forward method of its own"
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if id(parameter) in owners:
                return f"{what} shares a parameter with {owners[id(parameter)]}"
            owners[id(parameter)] = what
    return None
