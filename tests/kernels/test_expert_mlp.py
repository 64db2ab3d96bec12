"""The reference expert MLP against float64 written out, its gradients, and its edges."""

import pytest
import torch

from mmd2v_kernels import Expert, expert_mlp


def make_expert(width: int, hidden: int, dtype=torch.float64, layer_scale: bool = True) -> Expert:
    shapes = [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    tensors = [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    if layer_scale:
        tensors.append(torch.randn(width, dtype=dtype))
    return Expert(*[t.requires_grad_() for t in tensors])


def written_out(x, e: Expert, norm: str, eps: float, row_scale):
    """The formula, element by element, from the definition of LayerNorm and of the exact GELU."""

    def layer_norm(v):
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * e.norm_weight + e.norm_bias

    h = (layer_norm(x) if norm == "pre" else x) @ e.fc1_weight.T + e.fc1_bias
    t = (h * 0.5 * (1 + torch.erf(h / 2**0.5))) @ e.fc2_weight.T + e.fc2_bias
    if e.layer_scale is not None:
        t = t * e.layer_scale
    y = x + (t if row_scale is None else t * row_scale[:, None])
    return layer_norm(y) if norm == "post" else y


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("counts", [(5, 3), (0, 4), (4, 0), (1, 127), (129, 2)])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_formula_per_expert(norm, counts, scaled):
    torch.manual_seed(0)
    experts = [make_expert(6, 10, layer_scale=scaled) for _ in counts]
    total = sum(counts)
    x = torch.randn(total, 6, dtype=torch.float64, requires_grad=True)
    row_scale = torch.rand(total, dtype=torch.float64) if scaled else None
    rows = [(0, counts[0]), (counts[0], total)]
    out = expert_mlp(x, experts, rows, norm=norm, row_scale_T=row_scale)
    expected = torch.cat(
        [
            written_out(x[a:b], e, norm, 1e-6, None if row_scale is None else row_scale[a:b])
            for e, (a, b) in zip(experts, rows, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(out)
    parameters = [x, *[t for e in experts for t in e if isinstance(t, torch.Tensor)]]
    ours = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_dropped_row_keeps_its_value():
    x = torch.randn(3, 4, dtype=torch.float64)
    scale = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    out = expert_mlp(x, [make_expert(4, 8)], [(0, 3)], norm="pre", row_scale_T=scale)
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    assert not torch.equal(out[1], x[1])


def test_dropout_zeroes_branches_and_keeps_their_mean():
    torch.manual_seed(0)
    expert = make_expert(64, 64, layer_scale=False)
    x = torch.randn(2000, 64, dtype=torch.float64)
    plain = expert_mlp(x, [expert], [(0, 2000)], norm="pre") - x
    dropped = expert_mlp(x, [expert], [(0, 2000)], norm="pre", dropout=0.25) - x
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped[dropped != 0], plain[dropped != 0] / 0.75)


@pytest.mark.parametrize(
    ("rows", "experts"), [([(0, 2)], 1), ([(0, 2), (3, 4)], 2), ([(1, 4)], 1), ([(0, 4)], 2), ([(0, 5)], 1)]
)
def test_ranges_that_do_not_cover_the_rows_are_refused(rows, experts):
    with pytest.raises(ValueError, match="rows: found"):
        expert_mlp(torch.zeros(4, 4, dtype=torch.float64), [make_expert(4, 8)] * experts, rows, norm="pre")


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="expected 'pre' or 'post'"):
        expert_mlp(torch.zeros(1, 4), [make_expert(4, 8)], [(0, 1)], norm="sandwich")
