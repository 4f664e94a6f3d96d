"""LearnedLoss behaves like a loss of torch.nn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from evoloss.errors import ExpressionError
from evoloss.expressions import parse_expression
from evoloss.losses import LearnedLoss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SQUARE = "square(sub(y, f(x)))"
SHAPED = "abs(sub(mul(1.007, y), aq(f(x), tanh(mul(0.5, y)))))"
INDICES = torch.tensor([0, 2, 1, 2, 0])


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def logits(*shape, dtype=torch.float64, device="cpu"):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_regression_equals_mse(reduction, device):
    loss = LearnedLoss(SQUARE, kind="regression", reduction=reduction)
    x, target = logits(6, 2, device=device), logits(6, 2, device=device).detach() + 1
    expected = functional.mse_loss(x, target, reduction=reduction)
    torch.testing.assert_close(loss(x, target), expected)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 2)])
def test_class_indices_and_probabilities_agree(shape, device):
    x = logits(*shape, device=device)
    target = (torch.arange(x.numel() // 3).reshape(shape[:1] + shape[2:]) % 3).to(device)
    one_hot = functional.one_hot(target, 3).movedim(-1, 1).double()
    loss = LearnedLoss(SQUARE, scale=0.5)
    expected = 0.5 * ((one_hot - x.softmax(1)) ** 2).sum(1)
    torch.testing.assert_close(loss(x, target), expected.mean())
    torch.testing.assert_close(loss(x, one_hot), expected.mean())
    torch.testing.assert_close(loss(x, target.int()), expected.mean())
    loss.reduction = "none"
    torch.testing.assert_close(loss(x, target), expected)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_one_output_uses_the_sigmoid(shape):
    x = logits(*shape)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.3]).reshape(shape)
    cross_entropy = "sub(mul(mul(-1, y), log(f(x))), mul(sub(1, y), log(sub(1, f(x)))))"
    for reduction in ("mean", "sum", "none"):
        loss = LearnedLoss(cross_entropy, reduction=reduction)
        expected = functional.binary_cross_entropy_with_logits(
            x, target.double(), reduction=reduction
        )
        torch.testing.assert_close(loss(x, target), expected)


def test_cross_entropy_and_its_gradient_are_reproduced():
    loss = LearnedLoss("mul(-1, mul(y, log(f(x))))")
    x = logits(5, 3)
    for target in (INDICES, logits(5, 3).detach().softmax(1)):
        expected = functional.cross_entropy(x, target)
        torch.testing.assert_close(loss(x, target), expected)
        actual = torch.autograd.grad(loss(x, target), x)
        torch.testing.assert_close(actual, torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtype_follows_the_input(dtype, device):
    x = logits(5, 3, dtype=dtype, device=device)
    value = LearnedLoss(SHAPED)(x, INDICES.to(device))
    expected = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    assert value.dtype == expected
    assert value.device.type == device
    value.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


def test_gradients_of_first_and_second_order():
    for expression in (SHAPED, "log(add(f(x), mul(2, square(y))))"):
        loss = LearnedLoss(expression, scale=1.3)
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, INDICES), logits(5, 3))
        assert torch.autograd.gradgradcheck(lambda x, loss=loss: loss(x, INDICES), logits(5, 3))


def test_torch_func():
    loss = LearnedLoss(SHAPED)
    x = logits(4, 5, 3).detach()
    expected = torch.stack([loss(part, INDICES) for part in x])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(x, INDICES), expected)
    targets = torch.stack([INDICES, INDICES.flip(0), INDICES, INDICES])
    torch.func.vmap(torch.func.grad(loss))(x, targets)
    torch.func.jvp(lambda z: loss(z, INDICES), (x[0],), (x[1],))
    binary = LearnedLoss(SQUARE)
    torch.func.vmap(torch.func.grad(binary))(x[..., 0], x[..., 1])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_compiles_without_graph_breaks(kind):
    loss = LearnedLoss(SHAPED, kind=kind)
    target = INDICES if kind == "classification" else logits(5, 3).detach() + 0.5
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for dtype in (torch.float32, torch.float64):
        x = logits(5, 3, dtype=dtype)
        torch.testing.assert_close(compiled(x, target), loss(x, target))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, target), x), torch.autograd.grad(loss(x, target), x)
        )


def test_survives_pickle_and_deepcopy():
    loss = LearnedLoss(SHAPED, scale=0.7, reduction="sum")
    x = logits(5, 3)
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):  # noqa: S301
        assert repr(copied) == repr(loss)
        torch.testing.assert_close(copied(x, INDICES), loss(x, INDICES))
    model = torch.nn.ModuleDict({"loss": loss})
    model.load_state_dict(model.state_dict())
    assert not list(loss.parameters())


def test_repr_shows_the_formula():
    loss = LearnedLoss("abs(sub(mul(1.00702, y), f(x)))", scale=0.25)
    assert "0.25 · |1.007·y - f(x)|" in repr(loss)


def test_integer_targets_suit_real_valued_losses():
    x = logits(5)
    whole = torch.tensor([0, 1, 1, 0, 1])
    for kind in ("classification", "regression"):
        loss = LearnedLoss(SQUARE, kind=kind)
        torch.testing.assert_close(loss(x, whole), loss(x, whole.double()))


@pytest.mark.parametrize(
    ("kind", "x", "target", "error", "message"),
    [
        ("regression", torch.zeros(4, 1), torch.zeros(4), ValueError, "equal shapes"),
        ("regression", torch.zeros(4, dtype=torch.int64), torch.zeros(4), TypeError, "floating"),
        ("regression", torch.zeros(4), torch.zeros(4).cfloat(), TypeError, "must be real"),
        ("classification", torch.zeros(4, 3), torch.zeros(5).long(), ValueError, r"shape \(4,\)"),
        ("classification", torch.zeros(4, 3), torch.zeros(4), ValueError, "one per logit"),
        ("classification", torch.zeros(4, 3), torch.zeros(4).bool(), TypeError, "indices or"),
        ("classification", torch.zeros(4, 1), torch.zeros(4), ValueError, "equal shapes"),
        ("classification", torch.zeros(()), torch.zeros(()), ValueError, "batch dimension"),
        ("classification", torch.zeros(4, 3), torch.full((4,), 3), RuntimeError, "out of bounds"),
        ("classification", torch.zeros(4, 3), torch.full((4,), -1), RuntimeError, "out of bounds"),
    ],
)
def test_misuse_is_told_in_a_sentence(kind, x, target, error, message):
    with pytest.raises(error, match=message):
        LearnedLoss(SQUARE, kind=kind)(x, target)


def test_bad_construction_is_refused():
    with pytest.raises(ValueError, match="did you mean 'regression'"):
        LearnedLoss(SQUARE, kind="regresion")
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        LearnedLoss(SQUARE, reduction="meen")
    with pytest.raises(ExpressionError, match="finite"):
        LearnedLoss(SQUARE, scale=float("nan"))
    with pytest.raises(ExpressionError, match="position"):
        LearnedLoss("square(sub(y, f(x))")
    assert LearnedLoss(parse_expression(SQUARE)).expression == parse_expression(SQUARE)


def test_a_model_learns_with_it():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
    loss = LearnedLoss("mul(-1, mul(y, log(f(x))))")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    start = float(loss(model(x), y).detach())
    for _ in range(100):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    assert float(loss(model(x), y).detach()) < 0.6 * start
