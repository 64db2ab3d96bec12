"""Our layer against torchscale's multiway encoder layer: pre-norm, sub-LN, two owners, one joint sequence."""

import numpy as np
import pytest
import torch
from originals import FP32, Golden

from mmd2v.config.schema import LayerConfig
from mmd2v.models.layers import Layer
from mmd2v.models.packed import Layout

_HALVES = {
    "attention": {
        "norm": "self_attn_layer_norm",
        "inner_norm": "self_attn.inner_attn_ln",
        "proj": "self_attn.out_proj",
    },
    "mlp": {"norm": "final_layer_norm", "fc1": "ffn.fc1", "fc2": "ffn.fc2", "inner_norm": "ffn.ffn_layernorm"},
}


def theirs(name: str, owner: str, kind: str) -> str:
    """`ffn.fc1` of owner A is `ffn.A.fc1`; the others carry the owner last."""
    if name.startswith("ffn."):
        return f"w/ffn.{owner}.{name.removeprefix('ffn.')}.{kind}"
    return f"w/{name}.{owner}.{kind}"


@pytest.fixture(scope="module")
def golden(shared):
    return Golden(shared, "torchscale_layer")


@pytest.fixture(scope="module")
def layer(golden):
    config = LayerConfig(kind="separate", norm="pre", sub_norm=True, eps=1e-5)
    layer = Layer(config, 32, 4, ("A", "B"))
    state = {}
    for owner in "AB":
        for kind in ("weight", "bias"):
            for half, parts in _HALVES.items():
                for ours, name in parts.items():
                    state[f"{half}.{owner}.{ours}.{kind}"] = golden[theirs(name, owner, kind)]
            qkv = [golden[theirs(f"self_attn.{x}_proj", owner, kind)] for x in "qkv"]
            state[f"attention.{owner}.qkv.{kind}"] = torch.cat(qkv)
    layer.load_state_dict(state)
    return layer.eval()


@pytest.mark.parametrize("split", [-1, 0, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_torchscale(golden, layer, split, masked):
    x_BTD, is_pad = golden["in/x"], golden["in/padding_mask"]
    first = {-1: 13, 0: 0, 5: 5}[split]
    parts = {"A": slice(0, first), "B": slice(first, 13)}
    parts = {name: part for name, part in parts.items() if part.stop > part.start}
    layout = Layout(
        {name: np.full(2, part.stop - part.start) for name, part in parts.items()},
        torch.device("cpu"),
        key_masks={name: ~is_pad[:, part] for name, part in parts.items()} if masked else {},
        joint=True,
    )
    x_TD = torch.cat([x_BTD[:, part].flatten(0, 1) for part in parts.values()])
    with torch.no_grad():
        found = layout.split(layer(x_TD, layout))
    out_BTD = torch.cat([found[name].view(2, -1, 32) for name in parts], dim=1)
    expected = golden[f"out/x_split{split}" + ("" if masked else "_nomask")]
    torch.testing.assert_close(out_BTD, expected, **FP32)
