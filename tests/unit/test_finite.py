"""The vote on the weights before they are saved."""

import pytest
from torch import nn

from mmd2v.errors import UserError
from mmd2v.train.finite import check_weights


def _module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def test_good_weights_pass():
    check_weights(_module(), 3)
    check_weights(nn.Identity(), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_lost_weights_and_buffers_are_told(name, value):
    module = _module()
    module.state_dict()[name].view(-1)[1] = value
    with pytest.raises(UserError, match=r"step 3: weights became infinite or not a number on rank\(s\) 0"):
        check_weights(module, 3)
