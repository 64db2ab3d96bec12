"""Products of halves in fp32 give what torch's own give, rounded less often."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmd2v_kernels import half_products, linear

HALVES = (torch.bfloat16, torch.float16)
WIDTH, OUT = 96, 40


@pytest.fixture(autouse=True)
def _no_instructions(monkeypatch):
    """Whatever this machine has."""
    monkeypatch.setattr(half_products, "multiplies", lambda device, dtype: dtype not in HALVES)


def operands(rows: int, of_x: torch.dtype, of_weights: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, WIDTH), (OUT, WIDTH), (OUT,))
    values = [torch.randn(shape, generator=generator).bfloat16() / 8 for shape in shapes]
    return [value.to(dtype) for value, dtype in zip(values, (of_x, of_weights, of_weights), strict=True)]


def results(call, tensors: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def assert_as_good(tensors: list[torch.Tensor], half: torch.dtype) -> None:
    dout = torch.randn(len(tensors[0]), OUT, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = results(F.linear, [tensor.double() for tensor in tensors], dout.double())
    plain, found = results(F.linear, tensors, dout), results(linear, tensors, dout)
    assert [one.dtype for one in found] == [one.dtype for one in plain]
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert distance(ours, truth) <= 1.1 * distance(theirs, truth) + torch.finfo(half).eps / 8
        assert distance(ours, truth) <= torch.finfo(half).eps


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_as_accurate_as_torch_in_blocks_of_any_number(half, rows, monkeypatch):
    monkeypatch.setattr(half_products, "FP32_ROWS", 64)
    assert_as_good(operands(rows, half, half), half)


@pytest.mark.parametrize("entering", [torch.float32, torch.bfloat16])
def test_under_autocast_dtypes_are_those_of_torch(entering):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_good(operands(70, entering, torch.float32), torch.bfloat16)


def test_autocast_leaves_float64_alone():
    tensors = operands(70, torch.float64, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*tensors).dtype == torch.float64
        assert torch.equal(linear(*tensors), F.linear(*tensors))


def test_a_compiler_is_told_the_plain_formula():
    tensors = operands(9, *2 * (torch.bfloat16,))
    torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(*tensors), F.linear(*tensors))


def test_full_precision_is_torchs_own_product_bit_for_bit():
    tensors = operands(70, torch.float32, torch.float32)
    assert torch.equal(linear(*tensors), F.linear(*tensors))


def test_no_rows_give_no_rows_and_gradients_of_nothing():
    out, dx, dweight, dbias = results(linear, operands(0, *2 * (torch.bfloat16,)), torch.zeros(0, OUT))
    assert out.shape == (0, OUT) and dx.shape == (0, WIDTH)
    assert not dweight.any() and not dbias.any()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(operands(9, *2 * (torch.bfloat16,)))]
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_for_the_backward_pass_no_copies_in_full_precision_are_kept():
    kept = []
    leaves = [t.requires_grad_() for t in operands(9, *2 * (torch.bfloat16,))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(*leaves)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves[:2]}


def test_operands_of_different_dtypes_are_refused_as_torch_does():
    x, weight, bias = operands(9, torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight, bias)
