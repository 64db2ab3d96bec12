"""Checks of the Triton kernels against float64 and plain torch, on a GPU or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/device_checks.py         # without a GPU: fp32 and fp16, tiny shapes
    python tests/kernels/device_checks.py [BEGINNING OF A NAME [DTYPE]]      # with one: bf16 too

prints a JSON line a check. It needs torch and Triton, not pytest. The interpreter cannot do bf16: it multiplies the raw
bits. All memory that nothing was written to holds NaN.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import contrastive_checks
import retrieval_checks
import torch
import torch.nn.functional as F
from expert_samples import assert_as_good, in_dtype, make_expert, tensors_of

from mmd2v_kernels import Expert, add_layer_norm, distill_loss, distill_target, expert_mlp, route
from mmd2v_kernels.dispatch import OFFERS, PARTS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = {"float32": torch.float32, "float16": torch.float16} | ({} if INTERPRETED else {"bfloat16": torch.bfloat16})
NAMES = ("float32", "float16", "bfloat16")

Check = Callable[[torch.dtype], None]


OUR_PRODUCTS, LIBRARY_PRODUCTS = (
    ",".join([f"{name}=triton" for name in OFFERS] + [f"expert_mlp/{part}={path}" for part in PARTS["expert_mlp"]])
    for path in ("triton", "segmented")
)
"""Everything by Triton, or the matrix products of the MLP by the library."""


def by_path(path: str, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    os.environ["MMD2V_KERNELS"] = path
    try:
        return call()
    finally:
        del os.environ["MMD2V_KERNELS"]


def compare(run: Callable[[torch.dtype], dict[str, torch.Tensor]], dtype: torch.dtype, by: str = OUR_PRODUCTS) -> None:
    """``run`` rounds its inputs to ``dtype`` first, whatever it computes in."""
    exact = by_path("reference", lambda: run(torch.float64))
    plain = by_path("reference", lambda: run(dtype))
    assert_as_good(by_path(by, lambda: run(dtype)), plain, exact)


def rounded(*shape: int, to: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(to).to(DEVICE)


# --- add_layer_norm


def check_add_layer_norm(rows: int, width: int) -> Check:
    def check(dtype: torch.dtype) -> None:
        tensors = [rounded(*shape, to=dtype) for shape in [(rows, width)] * 2 + [(width,)] * 2]
        weights = [rounded(rows, width, to=dtype) for _ in range(2)]

        def run(computed: torch.dtype) -> dict[str, torch.Tensor]:
            own = [t.to(computed).requires_grad_() for t in tensors]
            out = add_layer_norm(*own, 1e-6)
            total = sum((a * b.to(computed)).sum() for a, b in zip(out, weights, strict=True))
            gradients = torch.autograd.grad(total, own)
            names = ("sum", "normed", "dx", "dbranch", "dweight", "dbias")
            return dict(zip(names, [*(t.detach() for t in out), *gradients], strict=True))

        compare(run, dtype)

    return check


def check_add_layer_norm_statistics(dtype: torch.dtype) -> None:
    """A large mean must not swallow the variance: statistics are those of fp32, not of the rounded sum."""
    x, branch = rounded(4, 33, to=dtype) + 100, rounded(4, 33, to=dtype, scale=0.01)
    weight, bias = torch.ones(33, dtype=dtype, device=DEVICE), torch.zeros(33, dtype=dtype, device=DEVICE)
    found = by_path("triton", lambda: {"normed": add_layer_norm(x, branch, weight, bias, 1e-6)[1]})["normed"]
    exact = F.layer_norm(x.double() + branch.double(), (33,), eps=1e-6)
    unit = 2 * torch.finfo(dtype).eps * exact.abs().max()  # and that of fp32 at 100, relative to a deviation of 1
    assert (found.double() - exact).abs().max() < unit + 200 * torch.finfo(torch.float32).eps


def check_operator(name: str, arguments: Callable[[torch.dtype], tuple]) -> Check:
    """Schema, fake implementation and autograd registration, as torch checks them."""

    def check(dtype: torch.dtype) -> None:
        torch.use_deterministic_algorithms(False)  # the checker compares memory that may be uninitialised
        found = arguments(dtype)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.mmd2v, name).default, found, test_utils=tests)

    return check


def layer_norm_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import add_layer_norm_triton  # noqa: F401

    tensors = [rounded(*shape, to=dtype).requires_grad_() for shape in [(5, 12)] * 2 + [(12,)] * 2]
    return (*tensors, 1e-6)


# --- distill_target and distill_loss


def lengths_mask(samples: int, tokens: int) -> torch.Tensor:
    """The first sample is whole, the last has no token at all."""
    lengths = torch.linspace(tokens, 0, samples).round() if samples > 1 else torch.tensor([max(1.0, tokens - 1)])
    return (torch.arange(tokens)[None, :] < lengths[:, None]).to(DEVICE)


def check_distill(
    shape: tuple[int, int, int], layers: int, masked: bool, layer_norm: bool, loss: str, beta: float = 1.0
) -> Check:
    def check(dtype: torch.dtype) -> None:
        # A mean far from 0 shows differences of squares; results that are no blocks of memory show strides.
        results = [(rounded(*shape[:2], shape[2] + 1, to=dtype) + 5)[..., 1:] for _ in range(layers)]
        prediction, weight = rounded(*shape, to=dtype), rounded(*shape[:2], to=torch.float32)
        how = {"mask_BT": lengths_mask(*shape[:2]) if masked else None, "final_layer_norm": layer_norm}

        def run(computed: torch.dtype) -> dict[str, torch.Tensor]:
            own = [result.to(computed) for result in results]
            if loss == "none":
                target = distill_target(own, **how)
                return {"target": target if not masked else target * how["mask_BT"][..., None]}
            predicted = prediction.to(computed).requires_grad_()
            distance = distill_loss(own, predicted, **how, loss=loss, beta=beta)
            (gradient,) = torch.autograd.grad((distance * weight.to(distance.dtype)).sum(), predicted)
            return {"loss": distance.detach(), "dprediction": gradient}

        compare(run, dtype)

    return check


def distill_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import distill_target_triton  # noqa: F401

    results = [rounded(2, 3, 12, to=dtype) for _ in range(2)]
    return results, rounded(2, 3, 12, to=dtype).requires_grad_(), lengths_mask(2, 3), True, "mse", 1.0, 1e-5


# --- expert_mlp


def on_device(experts: list[Expert], dtype: torch.dtype) -> list[Expert]:
    moved = [Expert(*[t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in expert]) for expert in experts]
    return in_dtype(moved, dtype)


def check_expert_mlp(
    counts: tuple[int, ...],
    width: int = 24,
    hidden: int = 40,
    scaled: bool = True,
    row_scaled: bool = False,
    interleaved: bool = False,
    dropped: bool = False,
    autocast: bool = False,
    by: str = OUR_PRODUCTS,
) -> Check:
    def check(dtype: torch.dtype) -> None:
        total = sum(counts)
        experts = [make_expert(width, hidden, layer_scale=scaled) for _ in counts]
        expert_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        if interleaved:
            expert_of_row = expert_of_row[torch.randperm(total)]
        keep = torch.rand(total) > 0.4 if dropped else torch.ones(total, dtype=torch.bool)
        plan = route(expert_of_row.numpy(), len(counts), DEVICE, keep=keep.numpy())
        row_scale = (torch.rand(total) + 0.5).to(dtype).to(DEVICE) if row_scaled else None
        outer = torch.float32 if autocast else dtype  # of rows and weights
        x, weight = rounded(total, width, to=outer), rounded(total, width, to=outer)
        own_weights = on_device(experts, outer)

        def run(computed: torch.dtype) -> dict[str, torch.Tensor]:
            of = computed if computed == torch.float64 else outer
            own, rows = in_dtype(own_weights, of), x.to(of).requires_grad_()
            scale = None if row_scale is None else row_scale.to(of)
            with torch.autocast(DEVICE.type, dtype=dtype, enabled=autocast and of != torch.float64):
                out = expert_mlp(rows, own, plan.rows, norm="pre", row_scale_T=scale, index_R=plan.index_R)
            gradients = torch.autograd.grad((out * weight.to(of)).sum(), [rows, *tensors_of(own)])
            return {"out": out.detach()} | {f"gradient{i}": gradient for i, gradient in enumerate(gradients)}

        with small_tiles():
            compare(run, dtype, by)

    return check


@contextmanager
def small_tiles() -> Iterator[None]:
    """In the interpreter, pieces so small that tiny shapes have several; on a GPU those that are shipped."""
    from mmd2v_kernels import expert_mlp_triton
    from mmd2v_kernels.expert_mlp_configurations import Tiles

    shipped = expert_mlp_triton.TILES
    if INTERPRETED:
        expert_mlp_triton.TILES = Tiles(
            rows=32,
            columns=32,
            gelu_columns=16,
            depth=16,
            wgrad=(16, 32, 16),
            chunk=40,
            norm=16,
            epilogue=(16, 32),
            step=8,
            flat=64,
        )
    try:
        yield
    finally:
        expert_mlp_triton.TILES = shipped


def check_the_same_every_time(dtype: torch.dtype, by: str = OUR_PRODUCTS) -> None:
    """To the last bit: a race would show sooner or later."""
    rows = 20 if INTERPRETED else 3000
    experts = on_device([make_expert(24, 40) for _ in range(2)], dtype)
    x, weight = rounded(2 * rows, 24, to=dtype).requires_grad_(), rounded(2 * rows, 24, to=dtype)

    def run() -> dict[str, torch.Tensor]:
        out = expert_mlp(x, experts, [(0, rows), (rows, 2 * rows)], norm="pre")
        gradients = torch.autograd.grad((out * weight).sum(), [x, *tensors_of(experts)])
        return dict(enumerate([out.detach(), *gradients]))

    with small_tiles():
        first = by_path(by, run)
        for _ in range(1 if INTERPRETED else 20):
            again = by_path(by, run)
            assert all(torch.equal(first[i], again[i]) for i in first)


def check_no_gradient_keeps_nothing(dtype: torch.dtype) -> None:
    from mmd2v_kernels import expert_mlp_triton

    experts = on_device([make_expert(8, 16)], dtype)
    x = rounded(5, 8, to=dtype)
    with torch.no_grad(), small_tiles():
        found = by_path("triton", lambda: {"out": expert_mlp(x, experts, [(0, 5)], norm="pre")})["out"]
        flat = tensors_of(experts)
        _, *saved = expert_mlp_triton._forward(x, None, None, flat, [5], True, 1e-6, dtype, False)
    exact = by_path("reference", lambda: {"out": expert_mlp(x, experts, [(0, 5)], norm="pre")})["out"]
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact, rtol=unit, atol=unit)
    assert all(t.numel() == 0 for t in saved)


def mlp_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import expert_mlp_triton  # noqa: F401

    experts = on_device([make_expert(8, 16)], dtype)
    return rounded(3, 8, to=dtype).requires_grad_(), None, None, tensors_of(experts), [3], True, 1e-6, dtype, True


def all_checks(interpreted: bool) -> dict[str, Check]:
    """Name → check; the interpreter leaves out what is too large for it."""
    found: dict[str, Check] = {}
    for rows, width in ((1, 8), (3, 5), (7, 48), (17, 12), (0, 16)):
        found[f"add_layer_norm/{rows}x{width}"] = check_add_layer_norm(rows, width)
    found["add_layer_norm/statistics"] = check_add_layer_norm_statistics
    found["add_layer_norm/operator"] = check_operator("add_layer_norm", layer_norm_arguments)
    for name, check in {
        "image": check_distill((2, 9, 24), 3, False, True, "none"),
        "text": check_distill((3, 7, 16), 2, True, False, "none"),
        "one_token": check_distill((1, 1, 70), 1, False, False, "none"),
        "two_tiles": check_distill((1, 35, 65), 2, True, True, "none"),
        "mse": check_distill((2, 9, 24), 2, False, True, "mse"),
        "mse_text": check_distill((3, 7, 16), 2, True, False, "mse"),
        "smooth_l1": check_distill((2, 9, 24), 2, True, True, "smooth_l1", 0.5),
        "l1": check_distill((1, 3, 24), 2, False, False, "smooth_l1", 0.0),
        "nothing": check_distill((0, 3, 8), 2, True, True, "mse"),
    }.items():
        found[f"distill/{name}"] = check
    for name, check in {
        "two": check_expert_mlp((37, 20)),
        "empty": check_expert_mlp((0, 33, 0)),
        "one_row": check_expert_mlp((1, 31), scaled=False),
        "tile_edges": check_expert_mlp((32, 33)),
        "whole_tiles": check_expert_mlp((32, 32), width=32, hidden=64, row_scaled=True),
        "interleaved": check_expert_mlp((20, 25), interleaved=True, row_scaled=True),
        "dropped": check_expert_mlp((30, 30), dropped=True, row_scaled=True),
        "autocast": check_expert_mlp((20, 21), autocast=True),
        "nothing": check_expert_mlp((0, 0)),
        "library_two": check_expert_mlp((37, 20), by=LIBRARY_PRODUCTS),
        "library_empty": check_expert_mlp((0, 33, 0), scaled=False, by=LIBRARY_PRODUCTS),
        "library_dropped": check_expert_mlp(
            (30, 30), interleaved=True, dropped=True, row_scaled=True, by=LIBRARY_PRODUCTS
        ),
        "library_autocast": check_expert_mlp((20, 21), autocast=True, by=LIBRARY_PRODUCTS),
    }.items():
        found[f"expert_mlp/{name}"] = check
    if not interpreted:
        for rows in (127, 128, 129, 5000):
            found[f"expert_mlp/shipped_{rows}"] = check_expert_mlp((rows, 70), width=768, hidden=3072)
        found["expert_mlp/library_shipped"] = check_expert_mlp((129, 70), width=768, hidden=3072, by=LIBRARY_PRODUCTS)
    found["expert_mlp/repeated"] = check_the_same_every_time
    found["expert_mlp/library_repeated"] = partial(check_the_same_every_time, by=LIBRARY_PRODUCTS)
    found["expert_mlp/no_gradient"] = check_no_gradient_keeps_nothing
    found["expert_mlp/operator"] = check_operator("expert_mlp", mlp_arguments)
    found["distill/operator"] = check_operator("distill_loss", distill_arguments)
    for operator, arguments in contrastive_checks.OPERATORS.items():
        found[f"contrastive/operator/{operator}"] = check_operator(operator, arguments)
    return found | contrastive_checks.all_checks(compare, interpreted) | retrieval_checks.all_checks(interpreted)


_SLOW_IN_THE_INTERPRETER = (
    *retrieval_checks.SLOW_IN_THE_INTERPRETER,
    *(f"contrastive/{name}" for name in contrastive_checks.SLOW_IN_THE_INTERPRETER),
)


def names(dtypes: Sequence[str], interpreted: bool) -> list[str]:
    """Return the checks of each dtype. The interpreter runs most of the slow ones in fp32 alone."""
    once = ("tile_edges", "whole_tiles", "one_row", "empty", "dropped", "repeated") if interpreted else ()
    return [
        f"{check}/{dtype}"
        for check in all_checks(interpreted)
        for dtype in dtypes
        if not (check.startswith("expert_mlp/") and check.endswith(once) and dtype != "float32")
        and not (interpreted and check.endswith(_SLOW_IN_THE_INTERPRETER) and dtype != "float32")
        and not (check.endswith("autocast") and dtype == "float32")
    ]


def main() -> int:
    failed, wanted, ending = 0, *(*sys.argv[1:3], "", "")[:2]
    checks = all_checks(INTERPRETED)
    for name in names(list(DTYPES), INTERPRETED):
        if not (name.startswith(wanted) and name.endswith(f"/{ending}" if ending else "")):
            continue
        check, _, dtype = name.rpartition("/")
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)
        start, problem = time.perf_counter(), ""
        try:
            checks[check](DTYPES[dtype])
        except Exception:
            problem, failed = traceback.format_exc(), failed + 1
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"check": name, "problem": problem, "seconds": seconds}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
