"""Sizes of the pieces of work of `expert_mlp`'s kernels, and the forms that these make, for ahead-of-time tests."""

from __future__ import annotations

from dataclasses import dataclass

from mmd2v_kernels.configuration import NORM_ROWS, TRITON_NAMES, Configuration, norm_block
from mmd2v_kernels.expert_mlp_product_kernels import (
    GELU,
    GELU_GRADIENT,
    PLAIN,
    RESIDUAL,
    epilogue_kernel,
    gelu_kernel,
    product_kernel,
    weight_gradient_kernel,
)
from mmd2v_kernels.expert_mlp_row_kernels import branch_gradient_kernel, norm_backward_kernel, norm_kernel

__all__ = ["TILES", "Tiles", "configurations"]


@dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces of work. On an H100 and in bf16 the fastest; ``step`` and ``flat`` were not measured yet."""

    rows: int = 128
    columns: int = 256
    gelu_columns: int = 128
    """Of parts 2 and 4, whose epilogue holds more."""
    depth: int = 64
    warps: int = 8
    stages: int = 4
    wgrad: tuple[int, int, int] = (128, 128, 32)
    """Rows and columns of a weight, and rows summed at a time."""
    wgrad_warps: int = 4
    chunk: int = 8192
    """Rows of a chunk of part 5, at most."""
    norm: int = 32
    """Rows of a program of part 7."""
    epilogue: tuple[int, int] = (64, 128)
    """Rows and columns of a program that follows the library's product."""
    epilogue_warps: int = 4
    step: int = 16
    """Rows at a time of a program that follows the library's product."""
    flat: int = 1024
    """Numbers of a program of GELU alone, after the library's product: its bias is the library's too."""


TILES = Tiles()


_ROWS = f"*{TRITON_NAMES['bfloat16']}"
"""Type of rows, weights and vectors."""
_EXPERTS = {"stops_ptr": "*i32", "experts": "i32"}
"""What `find_piece` is told."""
_WIDTH = 768


def configurations() -> list[Configuration]:
    """Return the forms for bf16, width 768 and hidden width 3072."""
    products = _products(TILES)
    epilogues = [_epilogue(one, TILES) for one in products if one.name.endswith(("fc2", "dgrad2"))]
    return [*products, *epilogues, _gelu(TILES), _weight_gradient(TILES), *_norms(TILES), _branch_gradient(TILES)]


def _products(tiles: Tiles) -> list[Configuration]:
    arguments = {"a_ptr": _ROWS} | _EXPERTS
    arguments |= dict.fromkeys(["weights_ptr", "biases_ptr", "scales_ptr"], "*i64")
    arguments |= dict.fromkeys(["vector_ptr", "h_ptr", "out_ptr", "x_ptr"], _ROWS)
    arguments |= {"index_ptr": "*i64", "row_scale_ptr": _ROWS, "sums_ptr": "*fp32", "columns": "i32", "depth": "i32"}
    flags = ["TRANSPOSED", "EPILOGUE", "HAS_INDEX", "HAS_SCALE", "HAS_ROW_SCALE", "HAS_BIAS", "KEEP", "EXACT", "WHOLE"]
    flags.append("PRECISION")
    arguments |= dict.fromkeys([*flags, "ROWS", "COLUMNS", "DEPTH"], "constexpr")
    found = []
    for name, columns, values in (
        ("fc1", tiles.gelu_columns, (False, GELU, False, False, False, True, True, False, True, "tf32")),
        ("fc2", tiles.columns, (False, RESIDUAL, True, True, True, True, False, False, True, "tf32")),
        ("dgrad2", tiles.gelu_columns, (True, GELU_GRADIENT, False, False, False, False, True, False, True, "tf32")),
        ("dgrad1", tiles.columns, (True, PLAIN, False, False, False, False, False, False, True, "tf32")),
    ):
        constants = dict(zip(flags, values, strict=True))
        constants |= {"ROWS": tiles.rows, "COLUMNS": columns, "DEPTH": tiles.depth}
        found.append(
            Configuration(
                f"expert_mlp/{name}",
                product_kernel,
                arguments,
                constants,
                tiles.warps,
                tiles.stages,
                tensor_cores=True,
                aligned=("columns", "depth"),
            )
        )
    return found


def _epilogue(product: Configuration, tiles: Tiles) -> Configuration:
    """Return the kernel that does after the library's product what ``product`` does after its own."""
    left_out = ("a_ptr", "weights_ptr", "depth", "TRANSPOSED", "WHOLE", "PRECISION", "DEPTH")
    arguments = {"raw_ptr": _ROWS} | {n: kind for n, kind in product.signature.items() if n not in left_out}
    constants = {n: value for n, value in product.constants.items() if n not in left_out}
    constants |= dict(zip(("ROWS", "COLUMNS"), tiles.epilogue, strict=True)) | {"STEP": tiles.step}
    return Configuration(
        f"{product.name}_epilogue",
        epilogue_kernel,
        arguments | {"STEP": "constexpr"},
        constants,
        tiles.epilogue_warps,
        aligned=("columns",),
    )


def _gelu(tiles: Tiles) -> Configuration:
    constants = {"EXACT": False, "BLOCK": tiles.flat}
    arguments = {"h_ptr": _ROWS, "out_ptr": _ROWS, "size": "i64"} | dict.fromkeys(constants, "constexpr")
    return Configuration("expert_mlp/gelu", gelu_kernel, arguments, constants, tiles.epilogue_warps, aligned=("size",))


def _weight_gradient(tiles: Tiles) -> Configuration:
    constants = {"WHOLE": True, "PRECISION": "tf32", "CHUNK": tiles.chunk}
    constants |= dict(zip(("HEIGHT", "COLUMNS", "DEPTH"), tiles.wgrad, strict=True))
    arguments = {"left_ptr": _ROWS, "right_ptr": _ROWS} | _EXPERTS
    arguments |= {"partial_ptr": "*fp32", "height": "i32", "columns": "i32"} | dict.fromkeys(constants, "constexpr")
    return Configuration(
        "expert_mlp/wgrad",
        weight_gradient_kernel,
        arguments,
        constants,
        tiles.wgrad_warps,
        tiles.stages,
        tensor_cores=True,
        aligned=("height", "columns"),
    )


def _norms(tiles: Tiles) -> list[Configuration]:
    block, warps = norm_block(_WIDTH)
    constants = {"HAS_INDEX": True, "ROWS": NORM_ROWS, "BLOCK": block}
    forward = {"x_ptr": _ROWS, "index_ptr": "*i64"} | _EXPERTS | {"weights_ptr": "*i64", "vector_ptr": _ROWS}
    forward |= {"normed_ptr": _ROWS, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "width": "i32", "eps": "fp32"}
    forward |= dict.fromkeys(constants, "constexpr")
    backward = {"dnormed_ptr": _ROWS, "x_ptr": _ROWS, "dout_ptr": _ROWS, "index_ptr": "*i64"} | _EXPERTS
    backward |= {"weights_ptr": "*i64", "vector_ptr": _ROWS, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": _ROWS}
    backward |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "width": "i32"}
    backward |= dict.fromkeys(["HAS_INDEX", "PIECE", "ROWS", "BLOCK"], "constexpr")
    return [
        Configuration("expert_mlp/norm", norm_kernel, forward, constants, warps, aligned=("width",)),
        Configuration(
            "expert_mlp/norm_backward",
            norm_backward_kernel,
            backward,
            constants | {"PIECE": tiles.norm},
            warps,
            aligned=("width",),
        ),
    ]


def _branch_gradient(tiles: Tiles) -> Configuration:
    constants = {"HAS_INDEX": True, "HAS_SCALE": True, "HAS_ROW_SCALE": True, "KEEP": True}
    constants |= dict(zip(("ROWS", "COLUMNS"), tiles.epilogue, strict=True))
    arguments = {"dout_ptr": _ROWS, "index_ptr": "*i64", "row_scale_ptr": _ROWS} | _EXPERTS
    arguments |= {"scales_ptr": "*i64", "vector_ptr": _ROWS, "u_ptr": _ROWS, "dt_ptr": _ROWS, "sums_ptr": "*fp32"}
    arguments |= {"width": "i32"} | dict.fromkeys(constants, "constexpr")
    return Configuration(
        "expert_mlp/branch_gradient",
        branch_gradient_kernel,
        arguments,
        constants,
        tiles.epilogue_warps,
        aligned=("width",),
    )
