"""What the time adds to all residual blocks at once is what each would find. Run: pytest tests/model/test_shifts.py"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.adapters import settings
from tests.model.conftest import make_unet
from toolkit.model.blocks import make_shifts
from toolkit.model.lora import inject_lora


def draw_time(seed: int) -> Tensor:
    return torch.randn(6, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_block_is_given_its_own() -> None:
    """For one time and then another; the layers keep their weights, as parts of what is multiplied."""
    unet = make_unet(dtype=torch.float64)
    resnets = [resnet for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for resnet in block.resnets]
    blocks = [part for resnet in resnets for part in (resnet.spatial_res_block, resnet.temporal_res_block)]
    for i, block in enumerate(blocks):  # all alike and zero would agree whatever is mixed up
        block.conv1.bias.data.normal_(generator=torch.Generator().manual_seed(i))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    shifts = make_shifts(unet.requires_grad_(False))
    assert shifts is not None and all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    for time in (draw_time(0), draw_time(1)):
        for block in blocks:
            wanted = block.time_emb_proj(F.silu(time)) + block.conv1.bias
            torch.testing.assert_close(shifts(block, time), wanted, rtol=1e-12, atol=1e-12)
    assert len(shifts.groups) < len(blocks) / 2  # a product for each width


def test_layers_that_train_are_asked_themselves() -> None:
    """One adapted layer is enough."""
    unet = make_unet()
    inject_lora(unet, settings(targets="down_blocks.0.resnets.0.temporal_res_block.time_emb_proj"), 0)
    assert make_shifts(unet) is None
