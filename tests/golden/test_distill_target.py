"""The unimodal target against tensors of the original implementation."""

import pytest
import torch
from safetensors.torch import load_file

from mmd2v_kernels import distill_target


@pytest.mark.parametrize(("name", "final_layer_norm"), [("kd_image", True), ("kd_text", False)])
def test_targets_and_loss_equal_the_originals(shared, name, final_layer_norm):
    golden = load_file(shared / "golden" / f"{name}.safetensors")

    def target(role: str) -> torch.Tensor:
        results = [golden[key] for key in sorted(golden) if key.startswith(f"in/{role}_layer")]
        return distill_target(results, final_layer_norm=final_layer_norm)

    torch.testing.assert_close(target("teacher"), golden["out/target"], rtol=0, atol=1e-5)
    torch.testing.assert_close(target("student"), golden["out/pred"], rtol=0, atol=1e-5)
    loss = torch.nn.functional.mse_loss(target("student"), target("teacher"))
    torch.testing.assert_close(loss, golden["out/loss"], rtol=1e-6, atol=0)


def test_a_mask_keeps_padding_out():
    torch.manual_seed(0)
    results = [torch.randn(1, 5, 4) for _ in range(3)]
    padded = [torch.cat([r, torch.full((1, 2, 4), 7.0)], dim=1) for r in results]
    mask = torch.tensor([[True] * 5 + [False] * 2])
    expected = distill_target(results, final_layer_norm=False)
    found = distill_target(padded, mask_BT=mask, final_layer_norm=False)
    torch.testing.assert_close(found[:, :5], expected)


def test_no_layer_result_is_refused():
    with pytest.raises(ValueError, match="found none"):
        distill_target([], final_layer_norm=True)
