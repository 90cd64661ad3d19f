"""Convolutions along the frames by matrix products are torch's own. Run: pytest tests/model/test_convolution.py"""

import pytest
import torch
import torch.nn.functional as F

from toolkit.model.convolution import FrameConvolution


@pytest.mark.parametrize("shape", [(1, 5, 6, 8), (2, 3, 4, 8), (2, 1, 4, 8)], ids=["a clip", "two", "one frame"])
def test_it_is_a_convolution(shape: tuple[int, int, int, int]) -> None:
    """Output and gradient, whatever clips and frames there are."""
    g = torch.Generator().manual_seed(0)
    x_BTNI = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    weight_OIK = torch.randn(12, 8, 3, generator=g, dtype=torch.float64)
    y = FrameConvolution.apply(x_BTNI, weight_OIK)
    wanted = F.conv3d(x_BTNI.permute(0, 3, 1, 2)[..., None], weight_OIK[..., None, None], padding=(1, 0, 0))
    wanted = wanted.squeeze(-1).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, wanted)
    gradient = torch.randn(y.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(own, x_BTNI, gradient, retain_graph=True) for own in (y, wanted)))
