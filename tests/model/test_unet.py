"""The UNet is SVD's, with a ninth channel that changes nothing by itself. Run: pytest tests/model/test_unet.py"""

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel

from tests.model.conftest import SMALL, forward, make_inputs, make_unet
from toolkit.config import ModelConfig
from toolkit.model.base import build_unet_on_meta
from toolkit.model.unet import PUBLISHED_CONFIGS, widen_conv_in

FRAMER = "wwen1997/framer_512x320"


def test_full_size_parameter_count() -> None:
    """Framer's UNet holds 1,524,625,966 parameters: SVD's, 2,880 of the ninth column and 4 of the mask token."""
    unet = build_unet_on_meta(ModelConfig(base="framer"))
    assert sum(p.numel() for p in unet.parameters()) == 1_524_625_966
    assert all(p.is_meta for p in unet.parameters()) and unet.config.in_channels == 9
    assert unet.mask_token.shape == (1, 1, 4, 1, 1) and len(unet.state_dict()) == 1429


@pytest.mark.parametrize("base", sorted(PUBLISHED_CONFIGS))
def test_published_configurations_differ_where_they_should(base: str) -> None:
    """8 channels for SVD, 9 for Framer; 14 frames for the first SVD, 25 otherwise."""
    config = PUBLISHED_CONFIGS[base]
    assert config["in_channels"] == (9 if base == FRAMER else 8)
    assert config["num_frames"] == (14 if base.endswith("img2vid") else 25)


def test_widening_changes_nothing() -> None:
    """The 9-channel UNet made of an 8-channel one gives its output exactly, whatever the ninth channel holds."""
    torch.manual_seed(0)
    stock = UNetSpatioTemporalConditionModel(in_channels=8, **SMALL).eval()
    wide = widen_conv_in(stock).eval()
    inputs = make_inputs(8)
    with torch.no_grad():
        wanted = forward(stock, inputs)
        for ninth in (torch.zeros(2, 3, 1, 8, 8), torch.randn(2, 3, 1, 8, 8) * 50, torch.ones(2, 3, 1, 8, 8)):
            wider = inputs | {"sample": torch.cat([inputs["sample"], ninth], 2)}
            assert torch.equal(forward(wide, wider), wanted)
    assert wide.config.in_channels == 9 and not wide.mask_token.any()
    assert not any(p.is_meta for p in [*wide.parameters(), *wide.buffers()])


def test_mask_token_stays_out_of_the_forward_pass() -> None:
    """The mask token enters through the input only; the UNet itself is the stock one."""
    unet, inputs = make_unet(), make_inputs()
    with torch.no_grad():
        before = forward(unet, inputs)
        unet.mask_token.add_(5)
        assert torch.equal(forward(unet, inputs), before)


def test_clips_of_a_batch_do_not_meet() -> None:
    """A batch of two gives what each clip gives alone."""
    unet, inputs = make_unet(), make_inputs()
    with torch.no_grad():
        both = forward(unet, inputs)
        for b in range(2):
            alone = forward(unet, {name: tensor[b : b + 1] for name, tensor in inputs.items()})
            assert torch.allclose(alone[0], both[b], atol=1e-5)
