"""The expert MLP, by each path, against float64 written out, its gradients, and its edges."""

import pytest
import torch
from expert_samples import make_expert, tensors_of, written_out

from mmd2v_kernels import expert_mlp


@pytest.fixture(params=["segmented", "reference"])
def path(request, monkeypatch):
    monkeypatch.setenv("MMD2V_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("counts", [(5, 3), (0, 4), (4, 0), (1, 127), (129, 2)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("inner", [False, True])
def test_equals_the_formula_per_expert(path, norm, counts, scaled, inner):
    torch.manual_seed(0)
    experts = [make_expert(6, 10, layer_scale=scaled, inner_norm=inner) for _ in counts]
    total = sum(counts)
    x = torch.randn(total, 6, dtype=torch.float64, requires_grad=True)
    row_scale = torch.rand(total, dtype=torch.float64) if scaled else None
    rows = [(0, counts[0]), (counts[0], total)]
    out = expert_mlp(x, experts, rows, norm=norm, row_scale_T=row_scale)
    expected = torch.cat(
        [
            written_out(x[a:b], e, norm, None if row_scale is None else row_scale[a:b])[0]
            for e, (a, b) in zip(experts, rows, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(out)
    parameters = [x, *tensors_of(experts)]
    ours = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_dropped_row_keeps_its_value(path):
    x = torch.randn(3, 4, dtype=torch.float64)
    scale = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    out = expert_mlp(x, [make_expert(4, 8)], [(0, 3)], norm="pre", row_scale_T=scale)
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    assert not torch.equal(out[1], x[1])


def test_dropout_zeroes_branches_and_keeps_their_mean(path):
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
