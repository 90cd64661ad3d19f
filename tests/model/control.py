"""ControlNets that fit a small UNet. No tests in here."""

import torch

from toolkit.model.controlnet import EMBEDDING_CHANNELS, FramerControlNet
from toolkit.model.unet import FramerUNet
from toolkit.rng import derive_seed


def make_controlnet(unet: FramerUNet, factor: int = 2, awake: bool = False) -> FramerControlNet:
    """A frozen ControlNet whose encoder is a copy of the UNet's; its residuals are zero unless it is awake.

    factor  pixels per latent pixel, the VAE's: a power of two up to 8; fewer halvings of the heatmaps than 8 needs
    """
    config = {**unet.config, "conditioning_embedding_out_channels": EMBEDDING_CHANNELS[: factor.bit_length()]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "controlnet"))
        controlnet = FramerControlNet.from_config(config)
    own = controlnet.state_dict().keys()
    copied = controlnet.load_state_dict({n: w for n, w in unet.state_dict().items() if n in own}, strict=False)
    assert all(name.startswith("controlnet_") for name in copied.missing_keys), copied.missing_keys
    if awake:
        for i, (name, parameter) in enumerate(controlnet.named_parameters()):
            if name.startswith("controlnet_"):
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return controlnet.requires_grad_(False).eval()
