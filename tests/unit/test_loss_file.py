"""Loss files: strict to read, whole or absent when written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from expression_strategies import expressions
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import evoloss
from evoloss.errors import EvolossError, LossFileError
from evoloss.expressions import Expression, call, parse_expression
from evoloss.losses import load, read_loss, save_loss

EXPRESSION = parse_expression("abs(sub(mul(1.0070201, y), f(x)))")


@pytest.fixture
def loss_path(tmp_path):
    path = tmp_path / "loss.json"
    save_loss(path, kind="classification", expression=EXPRESSION, scale=0.3, provenance={"seed": 1})
    return path


def edit(path, **changes):
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value != "DROP"}))
    return path


def refusal(path):
    with pytest.raises(LossFileError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_round_trip(loss_path):
    record = read_loss(loss_path)
    assert record["text"] == "|1.007·y - f(x)|"
    assert record["complexity"] == EXPRESSION.complexity
    loss = evoloss.load(loss_path, reduction="sum")
    assert loss.expression == EXPRESSION
    assert (loss.scale, loss.kind, loss.reduction) == (0.3, "classification", "sum")
    assert loss(torch.zeros(2, 3), torch.tensor([0, 1])).ndim == 0


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expressions().filter(lambda tree: tree.contains("f(x)")), st.floats(-1e9, 1e9))
def test_every_expression_comes_back_exactly(tmp_path, expression, scale):
    path = tmp_path / "any.json"
    save_loss(path, kind="regression", expression=expression, scale=scale)
    loss = load(str(path))
    assert (loss.expression, loss.scale) == (expression, scale)


def test_failed_search_is_recorded_and_refused_with_its_reason(tmp_path):
    path = tmp_path / "loss.json"
    save_loss(path, kind="regression", expression=None, reason="every candidate was rejected")
    assert read_loss(path)["status"] == "failed"
    assert refusal(path).endswith("holds no loss: every candidate was rejected")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "has format_version 7; this evoloss reads 1"),
        ({"format_version": "1"}, "has format_version '1'; this evoloss reads 1"),
        ({"format_version": True}, "has format_version True"),
        ({"format_version": "DROP"}, "has format_version None"),
        ({"format": "DROP"}, 'is not a loss: it lacks "format": "evoloss-loss"'),
        ({"format": "other"}, "is not a loss"),
        ({"kind": "ranking"}, "at kind: 'ranking' is not one of"),
        ({"kind": "DROP"}, "'kind' is a required property"),
        ({"extra": 1}, "'extra' was unexpected"),
        ({"scale": "0.1"}, "at scale"),
        ({"scale": True}, "at scale"),
        ({"scale": None}, "at scale"),
        ({"scale": 10**400}, "no usable formula"),
        ({"expression": None}, "at expression"),
        ({"expression": ["y"]}, "at expression"),
        ({"expression": "abs(sub(y, g(x)))"}, "unknown name 'g'"),
        ({"expression": "abs(sub(y, f(x))"}, "position"),
        ({"expression": "abs(y)"}, "does not contain f(x)"),
        ({"expression": "mul(1e999, f(x))"}, "constant is not finite"),
        ({"expression": "abs(" * 3000 + "f(x)" + ")" * 3000}, "deeper"),
        ({"status": "failed", "reason": None}, "at reason"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_content_is_one_clear_sentence(loss_path, changes, message):
    assert message in refusal(edit(loss_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not JSON"),
        (b"not json", "truncated or not JSON"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
        (b"[1, 2]", "is not a loss"),
        (b"null", "is not a loss"),
        (b'{"format": "evoloss-loss", "format": "x"}', "'format' occurs twice"),
        (b'{"scale": NaN}', "NaN is not a JSON number"),
        (b'{"scale": -Infinity}', "Infinity is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 150_000, "nested too deeply"),
        (b" " * 1_000_001, "larger than 1000000 bytes"),
        (b'{"scale": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"\x80\x04\x95\x0b\x00\x00\x00", "not JSON"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "loss.json"
    path.write_bytes(content)
    assert message in refusal(path)


def test_not_finite_scale_is_refused(loss_path):
    loss_path.write_text(loss_path.read_text().replace("0.3", "1e999"))
    assert "not finite" in refusal(loss_path)


def test_deep_nesting_inside_a_valid_file_is_refused(loss_path):
    for depth in (100, 400, 900, 5000, 100_000):
        deep = '{"a": ' * depth + "1" + "}" * depth
        text = json.dumps(json.loads(loss_path.read_text()) | {"provenance": "DEEP"})
        other = loss_path.with_name("deep.json")
        other.write_text(text.replace('"DEEP"', deep).replace('"scale": 0.3', '"scale": "x"'))
        refusal(other)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.json")
    assert "cannot be read" in refusal(tmp_path)
    with pytest.raises(LossFileError, match="cannot be read"):
        load("a\0b")


def test_every_truncation_is_refused(loss_path):
    content = loss_path.read_bytes().rstrip()
    for length in range(0, len(content), 7):
        loss_path.write_bytes(content[:length])
        refusal(loss_path)


def load_or_refuse(path):
    """Return the loss, or None if the file is refused; any other error escapes."""
    message = ""
    try:
        return load(path)
    except LossFileError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None


def valid_bytes():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loss.json"
        save_loss(path, kind="regression", expression=EXPRESSION, scale=0.3)
        return path.read_bytes()


VALID = valid_bytes()
edits = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 3), st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits)
@example([(0, 0, b"")])
def test_fuzzed_files_load_or_raise_a_loss_file_error(tmp_path, changes):
    content = VALID
    for start, removed, inserted in changes:
        content = content[:start] + inserted + content[start + removed :]
    path = tmp_path / "fuzzed.json"
    path.write_bytes(content)
    loss = load_or_refuse(path)
    assert loss is None or loss.expression.contains("f(x)")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(json.loads(VALID))), json_values)
def test_any_value_under_any_key_loads_or_raises_a_loss_file_error(tmp_path, key, value):
    path = tmp_path / "fuzzed.json"
    path.write_text(json.dumps(json.loads(VALID) | {key: value}))
    load_or_refuse(path)


def test_nothing_is_written_for_a_bad_loss(tmp_path):
    path = tmp_path / "loss.json"
    too_deep = EXPRESSION
    for _ in range(120):
        too_deep = call("abs", too_deep)
    bad = [
        {"kind": "ranking", "expression": EXPRESSION},
        {"kind": "regression", "expression": EXPRESSION, "scale": float("inf")},
        {"kind": "regression", "expression": None},
        {"kind": "regression", "expression": Expression("y")},
        {"kind": "regression", "expression": too_deep},
    ]
    for arguments in bad:
        with pytest.raises(EvolossError, match="cannot write"):
            save_loss(path, **arguments)
    assert list(tmp_path.iterdir()) == []
