"""Checks of the Triton kernels against float64 and plain torch, on a GPU or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/device_checks.py         # without a GPU: fp32 and fp16, tiny shapes
    python tests/kernels/device_checks.py                            # with one: bf16 too

prints a JSON line a check. It needs torch and Triton, not pytest. The interpreter cannot do bf16: it multiplies the raw
bits. All memory that nothing was written to holds NaN.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from expert_samples import assert_as_good

from mmd2v_kernels import add_layer_norm, distill_loss, distill_target

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = {"float32": torch.float32, "float16": torch.float16} | ({} if INTERPRETED else {"bfloat16": torch.bfloat16})
NAMES = ("float32", "float16", "bfloat16")

Check = Callable[[torch.dtype], None]


def by_path(path: str, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    os.environ["MMD2V_KERNELS"] = path
    try:
        return call()
    finally:
        del os.environ["MMD2V_KERNELS"]


def compare(run: Callable[[torch.dtype], dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """``run`` rounds its inputs to ``dtype`` first, whatever it computes in."""
    exact = by_path("reference", lambda: run(torch.float64))
    plain = by_path("reference", lambda: run(dtype))
    assert_as_good(by_path("triton", lambda: run(dtype)), plain, exact)


def rounded(*shape: int, to: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(to).to(DEVICE)


# --- add_layer_norm


def check_add_layer_norm(rows: int, width: int) -> Check:
    def check(dtype: torch.dtype) -> None:
        tensors = [rounded(*shape, to=dtype) for shape in [(rows, width)] * 2 + [(width,)] * 2]
        weights = [rounded(rows, width, to=dtype) for _ in range(2)]

        def run(in_dtype: torch.dtype) -> dict[str, torch.Tensor]:
            own = [t.to(in_dtype).requires_grad_() for t in tensors]
            out = add_layer_norm(*own, 1e-6)
            total = sum((a * b.to(in_dtype)).sum() for a, b in zip(out, weights, strict=True))
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

        def run(in_dtype: torch.dtype) -> dict[str, torch.Tensor]:
            own = [result.to(in_dtype) for result in results]
            if loss == "none":
                target = distill_target(own, **how)
                return {"target": target if not masked else target * how["mask_BT"][..., None]}
            predicted = prediction.to(in_dtype).requires_grad_()
            distance = distill_loss(own, predicted, **how, loss=loss, beta=beta)
            (gradient,) = torch.autograd.grad((distance * weight.to(distance.dtype)).sum(), predicted)
            return {"loss": distance.detach(), "dprediction": gradient}

        compare(run, dtype)

    return check


def distill_arguments(dtype: torch.dtype) -> tuple:
    from mmd2v_kernels import distill_target_triton  # noqa: F401

    results = [rounded(2, 3, 12, to=dtype) for _ in range(2)]
    return results, rounded(2, 3, 12, to=dtype).requires_grad_(), lengths_mask(2, 3), True, "mse", 1.0, 1e-5


def all_checks() -> dict[str, Check]:
    """Name → check, the same list everywhere."""
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
    found["distill/operator"] = check_operator("distill_loss", distill_arguments)
    return found


def names(dtypes: tuple[str, ...]) -> list[str]:
    return [f"{check}/{dtype}" for check, dtype in itertools.product(all_checks(), dtypes)]


def main() -> int:
    failed = 0
    for check, call in all_checks().items():
        for dtype_name, dtype in DTYPES.items():
            torch.manual_seed(0)
            torch.use_deterministic_algorithms(True, warn_only=True)
            start, problem = time.perf_counter(), ""
            try:
                call(dtype)
            except Exception:
                problem, failed = traceback.format_exc(), failed + 1
            seconds = round(time.perf_counter() - start, 3)
            print(json.dumps({"check": f"{check}/{dtype_name}", "problem": problem, "seconds": seconds}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
