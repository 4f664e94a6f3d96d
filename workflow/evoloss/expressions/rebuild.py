"""From the normal form back to a small expression tree.

A coefficient can stand outside a sum or be multiplied into its terms, outside an ``abs`` or inside;
each choice costs nodes. The smallest tree of the choices tried is taken.
"""

from __future__ import annotations

from collections import Counter

from evoloss.expressions.canonical import Normaliser, Term
from evoloss.expressions.expression import Expression, F, Y, call, constant

_LEAVES = {"f": F, "y": Y}
_EVEN = ("abs", "log", "sqrt", "q")


class Builder:
    """Builds trees of the terms of one `Normaliser`."""

    def __init__(self, normaliser: Normaliser) -> None:
        self.nodes = normaliser.nodes
        self._built: dict[Term, Expression] = {}

    def build(self, coefficient: float, key: str) -> Expression:
        """Return ``coefficient * base``."""
        found = self._built.get((coefficient, key))
        if found is None:
            found = min(self._forms(coefficient, key), key=lambda form: form.complexity)
            self._built[coefficient, key] = found
        return found

    def build_root(self, coefficient: float, key: str) -> tuple[float, Expression]:
        """Return (scale > 0, form): ``scale * form = coefficient * base + a constant``."""
        kind, parts = self.nodes.get(key, ("", ()))
        if kind == "add":
            parts = tuple(part for part in parts if part[1] != "1")
            if len(parts) == 1:
                return self.build_root(coefficient * parts[0][0], parts[0][1])
            units = [abs(value) for value, _ in parts]
            forms = [self._sum(parts, coefficient / unit / abs(coefficient)) for unit in units]
        elif kind in ("min", "max"):
            units = [abs(value) for value, _ in parts]
            sign = 1.0 if coefficient > 0.0 else -1.0
            forms = [self._extremum(kind, parts, sign / unit) for unit in units if unit > 0.0]
            units = [unit for unit in units if unit > 0.0]
        else:
            units, forms = [1.0], [self.build(1.0 if coefficient > 0.0 else -1.0, key)]
        choice = min(range(len(forms)), key=lambda i: forms[i].complexity)
        return abs(coefficient) * units[choice], forms[choice]

    def _forms(self, coefficient: float, key: str) -> list[Expression]:
        """Return equivalent trees, simplest idea first."""
        if key == "1":
            return [constant(coefficient)]
        kind, parts = self.nodes.get(key, ("", ()))
        forms = [_scaled(coefficient, self._base(key, kind, parts))]
        if kind == "add":
            forms += [
                _scaled(coefficient * value, self._sum(parts, 1.0 / value)) for value, _ in parts
            ]
            forms += [_scaled(-coefficient, self._sum(parts, -1.0)), self._sum(parts, coefficient)]
            if coefficient < 0.0:
                forms.reverse()
        elif kind in ("min", "max") and coefficient != 1.0:
            forms += [self._extremum(kind, parts, coefficient)]
        elif kind == "mul" and coefficient != 1.0:
            # multiply the coefficient into one factor that takes it without a node of its own
            names = [part for _, part in parts]
            for name in dict.fromkeys(names):
                if names.count(name) == 1 and self.nodes.get(name, ("",))[0] == "add":
                    forms.append(self._product(names, name, coefficient))
        elif kind == "abs" and coefficient not in (1.0, -1.0):
            inner = call("abs", self._even(abs(coefficient), parts[0][1]))
            forms.append(_scaled(1.0 if coefficient > 0.0 else -1.0, inner))
        elif kind == "tanh" and coefficient < 0.0:
            forms.append(_scaled(-coefficient, call("tanh", self.build(-parts[0][0], parts[0][1]))))
        return forms

    def _base(self, key: str, kind: str, parts: tuple[Term, ...]) -> Expression:
        if key in _LEAVES:
            return _LEAVES[key]
        if kind == "add":
            return self._sum(parts, 1.0)
        if kind in ("min", "max"):
            return self._extremum(kind, parts, 1.0)
        if kind == "mul":
            return self._product([part for _, part in parts])
        if kind == "q":
            return call("aq", constant(1.0), self._even(*parts[0]))
        if kind in _EVEN:
            return call(kind, self._even(*parts[0]))
        return call(kind, self.build(*parts[0]))

    def _even(self, coefficient: float, key: str) -> Expression:
        """Return ``+-coefficient * base``, whichever is smaller or reads better (y first)."""
        kind, parts = self.nodes.get(key, ("", ()))
        if kind == "add":
            shown = next((value for value, part in parts if part == "y"), parts[-1][0])
            coefficient = -coefficient if coefficient * shown < 0.0 else coefficient
        forms = [self.build(coefficient, key), self.build(-coefficient, key)]
        return min(forms, key=lambda form: form.complexity)

    def _sum(self, parts: tuple[Term, ...], factor: float) -> Expression:
        terms = [(value * factor, key) for value, key in parts]
        terms.sort(key=lambda part: (part[0] < 0.0, part[1] == "1", part[1] == "f"))
        total = self.build(*terms[0])
        for value, key in terms[1:]:
            name = "add" if value > 0.0 else "sub"
            total = call(name, total, self.build(abs(value), key))
        return total

    def _extremum(self, kind: str, parts: tuple[Term, ...], factor: float) -> Expression:
        if factor < 0.0:
            kind = "max" if kind == "min" else "min"
        forms = [self.build(value * factor, key) for value, key in parts]
        total = forms[0]
        for form in forms[1:]:
            total = call(kind, total, form)
        return total

    def _product(self, names: list[str], scaled: str = "", coefficient: float = 1.0) -> Expression:
        """Return the product of factors; the factor ``scaled`` is multiplied by ``coefficient``."""
        counts = Counter(names)
        forms: list[Expression] = []
        for kind in ("abs", "sign"):
            inner = [name for name in counts if name.startswith(f"{kind}(")]
            if len(inner) > 1 and all(counts[name] == 1 for name in inner):
                # |a| |b| = |a b|, and likewise sign
                forms.append(call(kind, self._product([self.nodes[n][1][0][1] for n in inner])))
                counts = Counter({name: n for name, n in counts.items() if name not in inner})
        halves = [name for name, count in counts.items() for _ in range(count // 2)]
        if all(name.startswith("q(") for name in halves):
            halves = []  # aq(aq(a, b), b) is smaller than a * square(aq(1, b))
        quotients: list[str] = []
        for name in sorted(counts, key=lambda name: (name != "y", name == "f")):
            left = counts[name] - 2 * halves.count(name)
            if name.startswith("q("):
                quotients += [name] * left
            elif left:
                forms.append(self.build(coefficient if name == scaled else 1.0, name))
        if len(halves) == 1:
            forms.append(call("square", self._even(1.0, halves[0])))
        elif halves:
            forms.append(call("square", self._product(halves)))
        if not forms:
            forms.append(constant(1.0))
        result = _chain(forms)
        for name in quotients:
            result = call("aq", result, self._even(*self.nodes[name][1][0]))
        return result


def _chain(forms: list[Expression]) -> Expression:
    total = forms[0]
    for form in forms[1:]:
        total = call("mul", total, form)
    return total


def _scaled(coefficient: float, form: Expression) -> Expression:
    return form if coefficient == 1.0 else call("mul", constant(coefficient), form)
