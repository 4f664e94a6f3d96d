"""A JSON schema's complaint about the configuration, as one sentence for its author."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jsonschema

from evoloss.errors import describe_choices

_ERROR_ORDER = ("additionalProperties", "type", "enum", "required")
_NUMBER_WITHOUT_DOT = re.compile(r"[-+]?\d+e[-+]?\d+", re.IGNORECASE)
_TYPES = {
    "object": "a mapping of keys to values",
    "array": "a list",
    "string": "text",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minItems": "entries: at least {}",
    "maxItems": "entries: at most {}",
    "minProperties": "entries: at least {}",
    "minLength": "characters: at least {}",
}


def rank_error(error: jsonschema.ValidationError) -> tuple[int, str]:
    """A misspelt key comes first: it also explains the missing one."""
    order = _ERROR_ORDER.index(error.validator) if error.validator in _ERROR_ORDER else 2
    return order, "/".join(map(str, error.absolute_path))


def describe_error(error: jsonschema.ValidationError, definitions: Mapping[str, Any]) -> str:
    """Turn a complaint into a sentence that names key, value and what is accepted.

    ``definitions`` are the $defs of the whole schema, which may refer to them.
    """
    path = _format_path(error.absolute_path)
    schema, value = error.schema, cast(Any, error.instance)
    if not isinstance(schema, Mapping):  # a schema of just `false`; ours has none
        return error.message
    if error.validator == "additionalProperties":
        accepted = schema.get("properties", {})
        unknown = next(key for key in value if key not in accepted)
        where = f" in {path}" if path else ""
        return f"unknown key{where}: {describe_choices(unknown, accepted)}"
    if error.validator == "required":
        missing = next(key for key in cast(list[str], error.validator_value) if key not in value)
        properties = _follow(schema, definitions).get("properties", {})
        wanted = _follow(properties.get(missing, {}), definitions)
        form = (
            f"; it must be {_describe_schema(wanted)}" if wanted.keys() & {"type", "enum"} else ""
        )
        return f"key {'.'.join(filter(None, [path, missing]))!r} is missing{form}"
    if error.validator == "enum":
        return f"{path} has unknown value {describe_choices(value, schema['enum'])}"
    if error.validator == "pattern" or "pattern" in schema:
        where = f" in {path}" if path else ""
        return f"name {value!r}{where} must start with a letter and hold only letters, digits and _"
    place = path or "the configuration"
    return f"{place} must be {_describe_schema(schema)}, not {_describe_value(value)}"


def _follow(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``schema`` with what its ``$ref`` refers to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return {**definitions[name], **schema} if name else schema


def _format_path(path: Iterable[str | int]) -> str:
    """Return ``search_seeds[1]`` or ``search.population_size``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _describe_schema(schema: Mapping[str, object]) -> str:
    if isinstance(choices := schema.get("enum"), list):
        return "one of " + ", ".join(map(str, choices))
    text = _TYPES.get(str(schema.get("type")), "a valid value")
    limits = [phrase.format(schema[key]) for key, phrase in _BOUNDS.items() if key in schema]
    if "minItems" in schema and schema["minItems"] == schema.get("maxItems"):
        limits = [f"entries: {schema['minItems']}"]
    return f"{text} ({', '.join(limits)})" if limits else text


def _describe_value(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return _shorten(repr(value))
    if _NUMBER_WITHOUT_DOT.fullmatch(value.strip()):
        mantissa, exponent = value.strip().lower().split("e")
        return (
            f"the text {value!r}; YAML needs a dot to see a number: write {mantissa}.0e{exponent}"
        )
    return f"the text {_shorten(repr(value))}"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
