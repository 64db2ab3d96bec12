"""The segmented path: accuracy in every dtype, blocks, rows left out, what it keeps and which operations it needs."""

import pytest
import torch
from expert_samples import assert_as_good, in_dtype, make_expert, tensors_of, written_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmd2v_kernels import Expert, expert_mlp, expert_mlp_segmented, leave_out, route

WIDTH, HIDDEN = 24, 40
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks_and_poisoned_memory(monkeypatch):
    """Several blocks an expert, and NaN in all memory that nothing was written to."""
    monkeypatch.delenv("MMD2V_KERNELS", raising=False)
    monkeypatch.setattr(expert_mlp_segmented, "_BLOCK", 48)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(x, experts, rows, weight, *, monkeypatch=None, path="segmented", **how) -> dict[str, torch.Tensor]:
    """Output and all gradients of a weighted sum of it."""
    if monkeypatch is not None:
        monkeypatch.setenv("MMD2V_KERNELS", path)
    x = x.detach().requires_grad_()
    found = expert_mlp(x, experts, rows, **how)
    parts = found if isinstance(found, tuple) else (found,)
    total = sum((part * w.to(part.dtype)).sum() for part, w in zip(parts, weight, strict=False))
    gradients = torch.autograd.grad(total, [x, *tensors_of(experts)])
    return {f"out{i}": part.detach() for i, part in enumerate(parts)} | {
        f"gradient{i}": gradient for i, gradient in enumerate(gradients)
    }


def ranges(counts) -> list[tuple[int, int]]:
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    return list(zip([0, *stops[:-1]], stops, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("counts", [(37, 90), (0, 127), (1, 128), (129,), (3, 0, 60)])
@pytest.mark.parametrize(("norm", "branch"), [("pre", False), ("pre", True), ("post", False)])
def test_no_less_accurate_than_plain_torch(dtype, counts, norm, branch, monkeypatch):
    exact_experts = in_dtype(in_dtype([make_expert(WIDTH, HIDDEN) for _ in counts], dtype), torch.float64)
    x = torch.randn(sum(counts), WIDTH).to(dtype)
    weight = torch.randn(2, sum(counts), WIDTH)
    how = {"rows": ranges(counts), "weight": weight, "norm": norm, "with_branch": branch}
    exact = results(x.double(), exact_experts, monkeypatch=monkeypatch, path="reference", **how)
    experts = in_dtype(exact_experts, dtype)
    plain = results(x, experts, monkeypatch=monkeypatch, path="reference", **how)
    found = results(x, experts, monkeypatch=monkeypatch, path="segmented", **how)
    assert [t.dtype for t in found.values()] == [t.dtype for t in plain.values()]
    assert_as_good(found, plain, exact)


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("entering", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_same_dtypes_and_no_less_accuracy(multiplies, inner, entering, monkeypatch):
    """With and without instructions for bf16, whatever this machine has."""
    monkeypatch.setattr(expert_mlp_segmented, "multiplies", lambda device, dtype: multiplies)
    counts = (50, 31)
    experts = in_dtype([make_expert(WIDTH, HIDDEN, inner_norm=inner) for _ in counts], torch.float32)
    x, weight = torch.randn(81, WIDTH).to(entering), torch.randn(1, 81, WIDTH)
    how = {"rows": ranges(counts), "weight": weight, "norm": "pre"}
    exact = results(x.double(), in_dtype(experts, torch.float64), monkeypatch=monkeypatch, path="reference", **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = results(x, experts, monkeypatch=monkeypatch, path="reference", **how)
        found = results(x, experts, monkeypatch=monkeypatch, path="segmented", **how)
    assert [t.dtype for t in found.values()] == [t.dtype for t in plain.values()]
    # Gradients of weights are fp32 there, but no better than the bf16 products they come from.
    unit = torch.finfo(torch.bfloat16).eps / 2
    for name in exact:
        ours, theirs = ((one[name].double() - exact[name]).norm() / exact[name].norm() for one in (found, plain))
        assert ours <= 2 * theirs + unit, name


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradient_of_dropout_is_that_of_differences(norm):
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expert = make_expert(4, 6, inner_norm=True)

    def call(x, *tensors):
        torch.manual_seed(1)
        return expert_mlp(x, [type(expert)(*tensors, 1e-6)], [(0, 5)], norm=norm, dropout=0.4, with_branch=True)

    assert torch.autograd.gradcheck(call, (x, *tensors_of([expert])))


def test_interleaved_rows_go_through_a_permutation(monkeypatch):
    experts = [make_expert(WIDTH, HIDDEN) for _ in range(3)]
    expert_of_row = torch.randint(0, 3, (100,)).numpy()
    plan = route(expert_of_row, 3, "cpu")
    x = torch.randn(100, WIDTH, dtype=torch.float64)
    for path in ("segmented", "reference"):
        monkeypatch.setenv("MMD2V_KERNELS", path)
        for norm in ("pre", "post"):
            out, branch = expert_mlp(x, experts, plan.rows, norm=norm, index_R=plan.index_R, with_branch=True)
            for i, expert in enumerate(experts):
                mine = torch.from_numpy(expert_of_row == i)
                expected, result = written_out(x[mine], expert, norm)
                torch.testing.assert_close(out[mine], expected)
                torch.testing.assert_close(branch[mine], result)


@pytest.mark.parametrize("ordered", [False, True])
def test_rows_that_are_left_out_cost_no_product_and_pass_their_gradient_on(ordered, monkeypatch):
    experts = [make_expert(WIDTH, HIDDEN) for _ in range(2)]
    x, weight = torch.randn(120, WIDTH, dtype=torch.float64), torch.randn(1, 120, WIDTH, dtype=torch.float64)
    keep = torch.arange(120) % 3 != 1
    row_scale = keep / 0.7
    rows = [(0, 70), (70, 120)]
    expected = results(
        x, experts, rows, weight, monkeypatch=monkeypatch, path="reference", norm="pre", row_scale_T=row_scale
    )
    if ordered:
        plan = leave_out(rows, keep.numpy(), "cpu")
    else:
        plan = route((torch.arange(120) >= 70).long().numpy(), 2, "cpu", keep=keep.numpy())
    monkeypatch.setenv("MMD2V_KERNELS", "segmented")
    with FlopCounterMode(display=False) as all_rows:
        results(x, experts, [(0, 70), (70, 120)], weight, norm="pre")
    with FlopCounterMode(display=False) as counter:
        found = results(x, experts, plan.rows, weight, norm="pre", row_scale_T=row_scale, index_R=plan.index_R)
    assert 120 * counter.get_total_flops() == int(keep.sum()) * all_rows.get_total_flops() > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert torch.equal(found["out0"][~keep], x[~keep])
    assert torch.equal(found["gradient0"][~keep], weight[0][~keep])


def test_all_rows_dropped(monkeypatch):
    experts = [make_expert(WIDTH, HIDDEN) for _ in range(2)]
    x, weight = torch.randn(9, WIDTH, dtype=torch.float64), torch.ones(1, 9, WIDTH, dtype=torch.float64)
    found = results(x, experts, [(0, 4), (4, 9)], weight, norm="pre", row_scale_T=torch.zeros(9, dtype=torch.float64))
    assert torch.equal(found["out0"], x) and torch.equal(found["gradient0"], weight[0])
    assert all((found[f"gradient{i}"] == 0).all() for i in range(1, 15))


def test_keeps_three_fifths_of_what_plain_torch_keeps_at_most(monkeypatch):
    experts = in_dtype([make_expert(32, 128) for _ in range(2)], torch.float32)
    x = torch.randn(300, 32, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in [*tensors_of(experts), x]}

    def kept(path: str) -> int:
        monkeypatch.setenv("MMD2V_KERNELS", path)
        storages = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = expert_mlp(x, experts, [(0, 200), (200, 300)], norm="pre")
            total = sum(storages.values())
        del out
        return total

    assert kept("segmented") == 300 * 128 * 4
    assert kept("segmented") <= 0.6 * kept("reference")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_contiguous_rows_are_neither_gathered_nor_concatenated():
    experts = in_dtype([make_expert(WIDTH, HIDDEN) for _ in range(2)], torch.float32)
    x, weight = torch.randn(120, WIDTH), torch.randn(1, 120, WIDTH)
    with Operations() as seen:
        results(x, experts, [(0, 70), (70, 120)], weight, norm="pre", row_scale_T=torch.full((120,), 2.0))
    assert {"addmm", "gelu", "native_layer_norm_backward"} <= seen.names
    assert not seen.names & {"cat", "index", "index_select", "gather", "index_put_", "slice_backward", "split"}


def test_frozen_weights_and_rows_get_no_gradient_and_cost_none():
    expert = make_expert(WIDTH, HIDDEN)
    x = torch.randn(30, WIDTH, dtype=torch.float64)
    expected = torch.autograd.grad(written_out(x, expert, "pre")[0].sum(), expert.layer_scale)[0]
    frozen = type(expert)(*[t.detach() if isinstance(t, torch.Tensor) else t for t in expert])
    only = frozen._replace(layer_scale=expert.layer_scale)
    out = expert_mlp(x, [only], [(0, 30)], norm="pre")
    torch.testing.assert_close(torch.autograd.grad(out.sum(), expert.layer_scale)[0], expected)
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (gradient,) = torch.autograd.grad(expert_mlp(x, [frozen], [(0, 30)], norm="pre").sum(), x)
    assert counter.get_total_flops() == 2 * 2 * 2 * 30 * WIDTH * HIDDEN
    torch.testing.assert_close(gradient, torch.autograd.grad(written_out(x, frozen, "pre")[0].sum(), x)[0])


def test_only_the_branch_may_be_used():
    expert = make_expert(WIDTH, HIDDEN)
    x = torch.randn(30, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = [x, *tensors_of([expert._replace(layer_scale=None)])]
    _, branch = expert_mlp(x, [expert], [(0, 30)], norm="pre", with_branch=True)
    ours = torch.autograd.grad(branch.square().sum(), inputs)
    theirs = torch.autograd.grad(written_out(x, expert, "pre")[1].square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_recomputed_layer_gives_the_same_gradient():
    expert = make_expert(WIDTH, HIDDEN)
    x = torch.randn(60, WIDTH, dtype=torch.float64, requires_grad=True)

    def layer(x):
        return expert_mlp(x, [expert], [(0, 60)], norm="pre").square().sum()

    plain = torch.autograd.grad(layer(x), [x, *tensors_of([expert])])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), [x, *tensors_of([expert])])
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_rather_than_wrong():
    expert = make_expert(WIDTH, HIDDEN)
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    out = expert_mlp(x, [expert], [(0, 6)], norm="pre")
    with pytest.raises(RuntimeError, match="only its reference has second derivatives"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


class TwoExperts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        experts = in_dtype([make_expert(WIDTH, HIDDEN) for _ in range(2)], torch.float32)
        self.weights = torch.nn.ParameterList(tensors_of(experts))

    def forward(self, x):
        weights = list(self.weights)
        return expert_mlp(x, [Expert(*weights[:7]), Expert(*weights[7:])], [(0, 6), (6, 10)], norm="pre")


@pytest.mark.parametrize("tool", ["compile", "export"])
def test_compilers_see_through_it(tool):
    torch.use_deterministic_algorithms(False)
    module, x = TwoExperts(), torch.randn(10, WIDTH)
    if tool == "compile":
        other = torch.compile(module, backend="eager", fullgraph=True)
    else:
        with torch.no_grad():
            other = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(other(x), module(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e._replace(norm_weight=e.norm_weight.float()), "several dtypes"),
        (lambda e: e._replace(layer_scale=None), "others not"),
    ],
)
def test_what_it_cannot_do_is_left_to_the_reference(change, reason, caplog):
    experts = [make_expert(WIDTH, HIDDEN), change(make_expert(WIDTH, HIDDEN))]
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    from mmd2v_kernels import dispatch

    dispatch._log_once.cache_clear()
    with caplog.at_level("INFO", logger="mmd2v_kernels.dispatch"):
        try:
            expert_mlp(x, experts, [(0, 4), (4, 8)], norm="pre")
        except RuntimeError as error:  # torch itself may refuse such a mixture
            assert "dtype" in str(error)
    assert "expert_mlp on cpu in float64: reference" in caplog.text and reason in caplog.text


@pytest.mark.parametrize("expert_of_row", [[0, 3], [-1, 0]])
def test_rows_of_unknown_experts_are_refused(expert_of_row):
    with pytest.raises(ValueError, match=r"expert_of_row: spans .* expected 0 … 2"):
        route(torch.tensor(expert_of_row).numpy(), 3, "cpu")


def test_rows_that_lie_in_order_need_no_index():
    plan = route(torch.tensor([0, 0, 2, 2, 2]).numpy(), 3, "cpu")
    assert plan.index_R is None and plan.rows == [(0, 2), (2, 2), (2, 5)]


def test_post_norm_changes_every_row():
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="found 2 of 4 rows"):
        expert_mlp(x, [make_expert(WIDTH, HIDDEN)], [(0, 2)], norm="post", index_R=torch.tensor([0, 2]))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_in_fp32_it_is_the_reference_to_the_last_bit(norm, monkeypatch):
    """As long as an expert's rows fit one block: sums over several are in another order."""
    experts = in_dtype([make_expert(WIDTH, HIDDEN, layer_scale=False) for _ in range(2)], torch.float32)
    x, weight = torch.randn(80, WIDTH), torch.randn(1, 80, WIDTH)
    found, expected = (
        results(x, experts, [(0, 40), (40, 80)], weight, monkeypatch=monkeypatch, path=path, norm=norm)
        for path in ("segmented", "reference")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
