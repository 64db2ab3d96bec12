"""Packed attention against xformers' own block-diagonal mask and against one sequence at a time."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.models import attention
from mmd2v.models.attention import attend, attend_sdpa
from mmd2v.models.packed import Layout

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 9), min_size=0, max_size=5)


def random_qkv(total: int, heads: int = 2, width: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(total, heads, width, dtype=dtype) for _ in range(3)]


def dense(q, k, v, bias):
    scores = torch.einsum("qhk,shk->hqs", q, k) / q.shape[-1] ** 0.5 + bias
    return torch.einsum("hqs,shk->qhk", scores.softmax(-1), v)


@given(image=LENGTHS, text=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_equals_dense_attention_under_the_block_diagonal_mask(image, text):
    fmha = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")
    if not image and not text:
        return
    layout = Layout.build({"image": image, "text": text}, CPU)
    q, k, v = random_qkv(layout.total)
    mask = fmha.BlockDiagonalMask.from_seqlens(image + text)
    bias = mask.materialize((layout.total, layout.total), dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, layout), dense(q, k, v, bias))


def test_gradients_flow_as_in_one_sequence_at_a_time():
    torch.manual_seed(0)
    layout = Layout.build({"image": [4, 4], "text": [3, 1, 5]}, CPU)
    q, k, v = (x.requires_grad_() for x in random_qkv(layout.total))
    weights = torch.randn(layout.total, 2, 4, dtype=torch.float64)
    ours = torch.autograd.grad((attend_sdpa(q, k, v, layout) * weights).sum(), [q, k, v])
    starts = np.concatenate([[0], np.cumsum(layout.all_lengths)])
    parts = [
        dense(q[a:b], k[a:b], v[a:b], torch.zeros(b - a, b - a, dtype=torch.float64))
        for a, b in itertools.pairwise(starts)
    ]
    theirs = torch.autograd.grad((torch.cat(parts) * weights).sum(), [q, k, v])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_xformers_on_cuda_equals_sdpa(dtype):
    pytest.importorskip("xformers.ops", reason="xformers is not installed")
    torch.manual_seed(0)
    lengths = {"image": [197] * 4, "text": [64, 3, 17, 1]}
    layout = Layout.build(lengths, torch.device("cuda"))
    q, k, v = (x.cuda() for x in random_qkv(layout.total, heads=12, width=64, dtype=torch.float32))
    expected = attend_sdpa(q, k, v, layout)
    attention._without_kernel.clear()
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), layout)
    if attention._without_kernel:
        pytest.skip("xformers is installed, but its extension does not load with this torch")
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 5e-3)


class OnCUDA:
    """A tensor that says it is on CUDA, for the choice of a path alone."""

    def __init__(self, x):
        self.device, self.dtype, self.shape = torch.device("cuda"), x.dtype, x.shape

    def __len__(self):
        return self.shape[0]


def test_what_xformers_has_no_kernel_for_goes_to_sdpa_and_is_told_once(monkeypatch, caplog):
    asked = []

    def refuse(q, *_):
        asked.append(q.shape[-1])
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward` with inputs:\n"
            "     query       : shape=(1, 4, 2, 20) (torch.bfloat16)\n"
            "`fa2F@2.5.7-pt` is not supported because:\n"
            "    xFormers wasn't build with CUDA support\n"
            "    query.shape[-1] % 8 != 0\n"
            "`cutlassF-pt` is not supported because:\n"
            "    xFormers wasn't build with CUDA support"
        )

    monkeypatch.setattr(attention, "xformers_available", lambda: True)
    monkeypatch.setattr(attention, "_attend_xformers", refuse)
    monkeypatch.setattr(attention, "attend_sdpa", lambda *_: "sdpa")
    monkeypatch.setattr(attention, "_without_kernel", set())
    layout = Layout.build({"text": [3, 1]}, CPU)
    for width in (20, 20, 12):
        x = OnCUDA(torch.zeros(4, 2, width, dtype=torch.bfloat16))
        assert attention.attend(x, x, x, layout) == "sdpa"
    assert asked == [20, 12]
    first, _ = [record.getMessage() for record in caplog.records]
    assert first == (
        "attention: torch SDPA for heads of 20 in torch.bfloat16: xFormers wasn't build with CUDA support; "
        "query.shape[-1] % 8 != 0"
    )


def test_layout_maps_agree_with_each_other():
    layout = Layout.build({"image": [2, 2], "text": [3, 1]}, CPU)
    assert layout.rows == {"image": slice(0, 4), "text": slice(4, 8)}
    assert layout.first_rows("text").tolist() == [0, 3]
    assert layout.sequence_of_row("text").tolist() == [0, 0, 0, 1]
    assert layout.sequence_of_row().tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert layout.position_of_row("text").tolist() == [0, 1, 2, 0]
    padding = layout.padding("text")
    rows = torch.arange(4)
    assert torch.equal(rows[padding.row_of_slot].flatten()[padding.slot_of_row], rows)
    assert padding.is_token.tolist() == [[True] * 3, [True, False, False]]
    assert layout.select(["text", "image"]) is layout
    assert layout.select(["text"]) is layout.select(["text"])
    assert layout.select(["text"]).rows == {"text": slice(0, 4)}
