"""Experts, their formula written out in float64, and how far a result may be from it."""

from __future__ import annotations

import torch

from mmd2v_kernels import Expert


def make_expert(
    width: int, hidden: int, dtype=torch.float64, layer_scale: bool = True, inner_norm: bool = False
) -> Expert:
    shapes = [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    tensors = [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    tensors.append(torch.randn(width, dtype=dtype) if layer_scale else None)
    if inner_norm:
        tensors += [torch.randn(hidden, dtype=dtype), torch.randn(hidden, dtype=dtype)]
    return Expert(*[t if t is None else t.requires_grad_() for t in tensors])


def tensors_of(experts: list[Expert]) -> list[torch.Tensor]:
    return [t for expert in experts for t in expert if isinstance(t, torch.Tensor)]


def in_dtype(experts: list[Expert], dtype: torch.dtype) -> list[Expert]:
    """Copies whose gradients are their own."""
    return [
        Expert(*[t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for t in expert])
        for expert in experts
    ]


def written_out(x, e: Expert, norm: str, row_scale=None):
    """The formula, element by element, from the definition of LayerNorm and of the exact GELU: (rows, fc2's output)."""

    def layer_norm(v, weight, bias):
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + e.eps).sqrt() * weight + bias

    h = (layer_norm(x, e.norm_weight, e.norm_bias) if norm == "pre" else x) @ e.fc1_weight.T + e.fc1_bias
    g = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    if e.inner_norm_weight is not None:
        g = layer_norm(g, e.inner_norm_weight, e.inner_norm_bias)
    result = g @ e.fc2_weight.T + e.fc2_bias
    t = result if e.layer_scale is None else result * e.layer_scale
    y = x + (t if row_scale is None else t * row_scale[:, None])
    return (layer_norm(y, e.norm_weight, e.norm_bias) if norm == "post" else y), result


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the exact value."""
    difference = found.double() - exact
    assert not difference.isnan().any()
    return float(difference.square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30))


def assert_as_good(
    found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Fail unless every result is within twice the error of plain torch in the same dtype, and one unit of it."""
    assert found.keys() == plain.keys() == exact.keys()
    for name in exact:
        assert found[name].shape == exact[name].shape, name
        if exact[name].numel() == 0:
            continue
        unit = torch.finfo(plain[name].dtype).eps
        ours, theirs = error(found[name], exact[name]), error(plain[name], exact[name])
        assert ours <= 2 * theirs + unit, f"{name}: error {ours:.3g}, plain torch {theirs:.3g}"
