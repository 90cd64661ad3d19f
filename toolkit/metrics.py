"""How near a generated frame is to the true one: PSNR and SSIM.

Test: pytest tests/test_metrics.py (SSIM against scikit-image). Images are fp32 in [-1, 1], (B, 3, H, W) in pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr_db(image_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,); infinite for equal images."""
    error_B = (image_BCHW - true_BCHW).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error_B)  # the range [-1, 1] has peak 2, and 2^2 = 4


def ssim(image_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), 1 for equal images; mean over colour channels and valid windows.

    source  Wang et al. 2004: Gaussian window of std 1.5 and width 11, K1 = 0.01, K2 = 0.03, population covariance
    """
    x, y = (image_BCHW + 1) / 2, (true_BCHW + 1) / 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def _blur(image_BCHW: Tensor) -> Tensor:
    offset = torch.arange(-5, 6, dtype=image_BCHW.dtype, device=image_BCHW.device)
    weight = torch.exp(-(offset**2) / (2 * 1.5**2))
    weight = (weight / weight.sum()).view(1, 1, 1, 11).expand(image_BCHW.shape[1], 1, 1, 11)
    groups = image_BCHW.shape[1]
    return F.conv2d(F.conv2d(image_BCHW, weight, groups=groups), weight.transpose(2, 3), groups=groups)
