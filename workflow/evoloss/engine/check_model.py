"""Whether a base model can be trained as one of a population: found by trial runs on a few rows, before any training.

A network must be a function of its parameters and inputs alone, that several networks' parameters can be put through
at once (`torch.func.vmap`). Nothing of that can be read off a model's layers, as anybody may write one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.parameter import is_lazy

from evoloss.engine.functional import FunctionalModel
from evoloss.errors import ModelError, take_first_line


@dataclass(frozen=True)
class _Call:
    """What a module was given, as far as it is tensors, and its output."""

    inputs: list[Tensor]
    output: Tensor


class _Trial:
    """A copy of the model that remembers its modules' last calls and where it stopped."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.calls: dict[str, _Call] = {}
        self.overwriting: str | None = None
        self._input = torch.empty(0)
        self._entered: list[tuple[str, int, list[Tensor]]] = []
        self._types = {name: type(module).__name__ for name, module in self.model.named_modules()}
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda *args, name=name: self._enter(name, args[-1]))
            module.register_forward_hook(lambda *args, name=name: self._leave(name, args[-1]))

    def _enter(self, name: str, inputs: tuple[object, ...]) -> None:
        # copied, as a module may overwrite them
        tensors = [value.detach().clone() for value in inputs if _is_plain(value)]
        self._entered.append((name, self._input._version, tensors))

    def _leave(self, name: str, output: object) -> None:
        # torch counts a tensor's changes in place as its versions
        _, version, inputs = self._entered.pop()
        if self._input._version > version and self.overwriting is None:
            self.overwriting = name
        if _is_plain(output):
            self.calls[name] = _Call(inputs, output)

    def read_state(self) -> dict[tuple[str, str], object]:
        """Return what the modules remember beside caches, by their names and those of the attributes."""
        state: dict[tuple[str, str], object] = {}
        for path, module in self.model.named_modules():
            for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
                if _is_plain(value):
                    # bytes, because NaN differs from itself
                    flat = value.detach().cpu().reshape(-1)
                    state[path, name] = flat.view(torch.uint8).numpy().tobytes()
                elif isinstance(value, bool | int | float | str):
                    state[path, name] = repr(value)
                elif isinstance(value, list | set):
                    state[path, name] = len(value)
        return state

    def run(self, x: Tensor) -> dict[str, _Call]:
        """Return all modules' calls, innermost first; ``overwriting`` names the one that changed the inputs."""
        self.calls, self._input = {}, x.clone()
        self.model(self._input)
        if self.overwriting is None and not torch.equal(self._input, x):
            self.overwriting = ""  # by way of .data, which torch does not count
        return self.calls

    @torch.no_grad()
    def move_parameters(self) -> None:
        """Give the copy other parameters, the same for all copies of one model."""
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.1)

    def describe(self, name: str) -> str:
        """Return a module's name and type for a message."""
        return f"its module {name!r} ({self._types[name]})" if name else f"its {self._types[name]}"

    def describe_stop(self) -> str:
        """Return the module that was entered last and not left."""
        return self.describe(self._entered[-1][0] if self._entered else "")

    def advise(self, path: str) -> str:
        """Return an example of a layer without state, where there is one to name."""
        has_statistics = self._types[path].startswith(
            ("BatchNorm", "SyncBatchNorm", "InstanceNorm")
        )
        return ", e.g. GroupNorm" if has_statistics else ""


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a tensor that can be compared: neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def check_model(model: nn.Module, model_name: str, x: Tensor, num_outputs: int) -> None:
    """Refuse a model that a population of networks cannot be trained of.

    What it remembers is found as far as a few calls show it: its attributes, buffers and parameters stay the same, and
    so do its outputs after calls with other inputs and with other parameters.

    Parameters
    ----------
    model
        It stays as it is, and so does the global random state.
    model_name
        For the message.
    x
        Four inputs (4, ...): two to compare outputs for, two to call it with before.
    num_outputs
        Outputs that the task needs of the model.

    Raises
    ------
    ModelError
        In one sentence that names the module: it fails on the inputs or changes them, has outputs of another shape or
        that are not finite, a parameter is lazy, has a hook or no influence, it changes a buffer, parameter or
        attribute when it is called, its outputs depend on earlier calls, it is random, or `torch.func.vmap` cannot
        handle it.
    """
    refuse = f"model {model_name!r} cannot be trained here:"
    _check_tensors(model, refuse)
    x, other = x[:2], x[-2:]
    with torch.random.fork_rng(devices=[]):
        with _explain(f"{refuse} it cannot be copied"):
            trial, again, used, moved = (_Trial(model) for _ in range(4))
        before = trial.read_state()
        with _explain(f"{refuse} it fails on two rows of the training data, in", trial):
            first = trial.run(x)
            trial.run(x)
        if trial.overwriting is not None:
            raise ModelError(
                f"{refuse} {trial.describe(trial.overwriting)} changes the model's inputs in place, which are the data "
                "themselves; let it compute with a copy"
            )
        after = trial.read_state()
        # a tensor that was not there before may be a cache, and so may what a dict holds: the outputs tell
        for path, name in before:
            if after.get((path, name)) != before[path, name]:
                module = trial.model.get_submodule(path)
                kind = "buffer" if name in module._buffers else "attribute"
                kind = "parameter" if name in module._parameters else kind
                raise ModelError(
                    f"{refuse} {trial.describe(path)} changes its {kind} {name!r} when it is called, which the "
                    f"networks of a population would share; use a layer without such state{trial.advise(path)}"
                )
        with _explain(f"{refuse} it fails on the same rows in another copy, in", again):
            repeated = again.run(x)
        if culprit := _find_difference(first, repeated):
            raise ModelError(
                f"{refuse} {trial.describe(culprit[0])} is random: it gives other outputs when it is called again, so "
                "losses could not be compared; leave it out"
            )
        with _explain(f"{refuse} it fails when it is called again, in", used):
            for rows in (x, other):
                used.run(rows)
            used.move_parameters()
            found = used.run(x)
        with _explain(f"{refuse} it fails with other parameters, in", moved):
            moved.move_parameters()
            expected = moved.run(x)
        if culprit := _find_difference(expected, found):
            raise ModelError(
                f"{refuse} {trial.describe(culprit[0])} remembers earlier calls: its outputs depend on the inputs or "
                "parameters that it had then, which the networks of a population would share; use a layer without "
                "such state"
            )
        if "" not in first:
            raise ModelError(f"{refuse} it does not return a single tensor")
        _check_outputs(trial.model, refuse, first[""].output, (len(x), num_outputs))
        stacked = {n: torch.stack([p.detach()] * 2) for n, p in trial.model.named_parameters()}
        with _explain(
            f"{refuse} torch.func.vmap cannot compute two networks at once (control flow that depends on computed "
            "values, or changes in place?), in",
            trial,
        ):
            functional = FunctionalModel(trial.model)
            vmap(lambda params: functional(params, x))(stacked)


def _check_tensors(model: nn.Module, refuse: str) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ModelError(
                f"{refuse} its {kind} {name!r} has no shape before the first call; use a layer that is given its "
                "number of inputs, not a lazy one"
            )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ModelError(
                f"{refuse} its parameter {name!r} has a gradient hook, which training here would not call; take it off"
            )


def _find_difference(first: dict[str, _Call], second: dict[str, _Call]) -> list[str]:
    """Return the modules whose outputs differ, in the order of their ends; before others those with equal inputs."""

    def is_close(a: Tensor, b: Tensor) -> bool:
        # a GPU may sum in another order the second time
        return a.shape == b.shape and torch.allclose(
            a.detach().double(), b.detach().double(), 1e-3, equal_nan=True
        )

    both = [(name, first[name], second[name]) for name in first if name in second]
    differ = [(n, a, b) for n, a, b in both if not is_close(a.output, b.output)]
    cause = [
        n
        for n, a, b in differ
        if len(a.inputs) == len(b.inputs) and all(map(is_close, a.inputs, b.inputs))
    ]
    return cause + [n for n, *_ in differ]


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
        raise ModelError(f"{sentence}{where}: {take_first_line(error)}") from error
