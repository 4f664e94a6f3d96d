"""Whether a base model can be trained as one of a population: found by a trial run on two rows, before any training.

A network must be a function of its parameters and inputs alone, that several networks' parameters can be put through
at once (`torch.func.vmap`). Nothing of that can be read off a model's layers, as anybody may write one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.parameter import is_lazy

from evoloss.engine.functional import FunctionalModel
from evoloss.errors import ModelError


class _Trial:
    """A copy of the model that remembers the outputs of its modules and where it stopped."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.outputs: dict[str, Tensor] = {}
        self.overwriting: str | None = None
        self._input = torch.empty(0)
        self._entered: list[tuple[str, int]] = []
        self._types = {name: type(module).__name__ for name, module in self.model.named_modules()}
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            module.register_forward_hook(lambda *args, name=name: self._leave(name, args[-1]))

    def _enter(self, name: str) -> None:
        self._entered.append((name, self._input._version))

    def _leave(self, name: str, output: object) -> None:
        # torch counts a tensor's changes in place as its versions
        _, version = self._entered.pop()
        if self._input._version > version and self.overwriting is None:
            self.overwriting = name
        if isinstance(output, Tensor):
            self.outputs[name] = output

    def read_state(self) -> dict[tuple[str, str], object]:
        """Return what the modules remember beside parameters and caches, by their names and those of the attributes."""
        state: dict[tuple[str, str], object] = {}
        for path, module in self.model.named_modules():
            for name, value in {**vars(module), **module._buffers}.items():
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    # bytes, because NaN differs from itself
                    flat = value.detach().cpu().reshape(-1)
                    state[path, name] = flat.view(torch.uint8).numpy().tobytes()
                elif isinstance(value, bool | int | float | str):
                    state[path, name] = repr(value)
                elif isinstance(value, list | set):
                    # a dict is a cache, as a rule
                    state[path, name] = len(value)
        return state

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Return all modules' outputs, innermost first; ``overwriting`` names the one that changed the inputs."""
        self.outputs, self._input = {}, x.clone()
        self.model(self._input)
        if self.overwriting is None and not torch.equal(self._input, x):
            self.overwriting = ""  # by way of .data, which torch does not count
        return self.outputs

    def describe(self, name: str) -> str:
        """Return a module's name and type for a message."""
        return f"its module {name!r} ({self._types[name]})" if name else f"its {self._types[name]}"

    def describe_stop(self) -> str:
        """Return the module that was entered last and not left."""
        return self.describe(self._entered[-1][0] if self._entered else "")


def check_model(model: nn.Module, model_name: str, x: Tensor, num_outputs: int) -> None:
    """Refuse a model that a population of networks cannot be trained of.

    Parameters
    ----------
    model
        It stays as it is, and so does the global random state.
    model_name
        For the message.
    x
        Two inputs (2, ...).
    num_outputs
        Outputs that the task needs of the model.

    Raises
    ------
    ModelError
        In one sentence that names the module: it fails on the inputs or changes them, has outputs of another shape or
        that are not finite, a parameter is lazy, has a hook or no influence, it changes a buffer or attribute when it
        is called, its outputs depend on earlier calls, it is random, or `torch.func.vmap` cannot handle it.
    """
    refuse = f"model {model_name!r} cannot be trained here:"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ModelError(
                f"{refuse} its {kind} {name!r} has no shape before the first call, so no seed could fill it; use a "
                "layer that is given its number of inputs, not a lazy one"
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ModelError(
                f"{refuse} its parameter {name!r} has a gradient hook, which training here would not call; take it off"
            )
    with torch.random.fork_rng(devices=[]):
        with _explain(f"{refuse} it cannot be copied"):
            trial = _Trial(model)
        before = trial.read_state()
        with _explain(f"{refuse} it fails on two rows of the training data, in", trial):
            first, second = trial.run(x), trial.run(x)
        if trial.overwriting is not None:
            raise ModelError(
                f"{refuse} {trial.describe(trial.overwriting)} changes the model's inputs in place, which are the data "
                "themselves; let it compute with a copy"
            )
        after = trial.read_state()
        # a tensor that was not there before is taken for a cache, which no output depends on
        for path, name in before:
            if after.get((path, name)) != before[path, name]:
                buffers = trial.model.get_submodule(path)._buffers
                kind = "buffer" if name in buffers else "attribute"
                instead = ", e.g. GroupNorm" if "Norm" in trial.describe(path) else ""
                raise ModelError(
                    f"{refuse} {trial.describe(path)} changes its {kind} {name!r} when it is called, which the "
                    f"networks of a population would share; use a layer without such state{instead}"
                )
        if different := _find_difference(first, second):
            raise ModelError(
                f"{refuse} {trial.describe(different[0])} is random: it gives other outputs when it is called again, "
                "so losses could not be compared; leave it out"
            )
        # first inputs may stay in what is None until then, such as the statistics that a layer starts from
        used = _Trial(model)
        with _explain(f"{refuse} it fails on two equal rows of the training data, in", used):
            used.run(x[[0, 0]])
        if different := _find_difference(first, used.run(x)):
            raise ModelError(
                f"{refuse} {trial.describe(different[0])} remembers earlier inputs: its outputs depend on them, which "
                "the networks of a population would share; use a layer without such state"
            )
        if "" not in first:
            raise ModelError(f"{refuse} it does not return a single tensor")
        _check_outputs(trial.model, refuse, first[""], (len(x), num_outputs))
        stacked = {n: torch.stack([p.detach()] * 2) for n, p in trial.model.named_parameters()}
        with _explain(
            f"{refuse} torch.func.vmap cannot compute two networks at once (control flow that depends on computed "
            "values, or changes in place?), in",
            trial,
        ):
            functional = FunctionalModel(trial.model)
            vmap(lambda params: functional(params, x))(stacked)


def _find_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names of the modules whose outputs differ, innermost first."""

    def is_close(a: Tensor, b: Tensor | None) -> bool:
        # a GPU may sum in another order the second time
        return (
            b is not None
            and a.shape == b.shape
            and torch.allclose(a.double(), b.double(), 1e-3, equal_nan=True)
        )

    return [name for name, output in first.items() if not is_close(output, second.get(name))]


def check_second_derivative(model: nn.Module, model_name: str, x: Tensor) -> None:
    """Refuse a model that local search cannot differentiate through a training step of; parameters as `check_model`.

    Raises
    ------
    ModelError
        In one sentence.
    """
    refuse = (
        f"model {model_name!r} has no second derivative, which local search (methods: evomal) needs"
    )
    with torch.random.fork_rng(devices=[]), _explain(refuse):
        params = [p for p in model.parameters() if p.requires_grad]
        outputs = model(x)
        probe = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(outputs, params, probe, create_graph=True)
        # one by one: autograd leaves out silently what it cannot differentiate, if it can differentiate the rest
        for product in transposed:
            torch.autograd.grad(product.sum(), probe, retain_graph=True)


def _check_outputs(
    model: nn.Module, refuse: str, outputs: Tensor, expected: tuple[int, int]
) -> None:
    if tuple(outputs.shape) != expected:
        raise ModelError(
            f"{refuse} its outputs for {expected[0]} rows have shape {tuple(outputs.shape)}, but the task needs "
            f"{expected}"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ModelError(
            f"{refuse} its outputs for {expected[0]} rows of the training data are not finite before any training"
        )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable or not outputs.requires_grad:
        raise ModelError(f"{refuse} its outputs depend on no parameter that requires a gradient")
    gradients = torch.autograd.grad(outputs.sum(), list(trainable.values()), allow_unused=True)
    for name, gradient in zip(trainable, gradients, strict=True):
        if gradient is None:
            raise ModelError(
                f"{refuse} its parameter {name!r} has no influence on the outputs; remove it, or freeze it with "
                "requires_grad_(False)"
            )


@contextmanager
def _explain(sentence: str, trial: _Trial | None = None) -> Iterator[None]:
    """Turn whatever a model of the user's own raises into one sentence."""
    try:
        yield
    except Exception as error:
        where = f" {trial.describe_stop()}" if trial is not None else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{sentence}{where}: {reason}") from error
