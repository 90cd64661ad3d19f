"""PSNR and SSIM against independent references. Run: pytest tests/test_metrics.py"""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from toolkit.metrics import psnr_db, ssim


def make_pairs(height_px: int = 40, width_px: int = 52) -> tuple[Tensor, Tensor]:
    """Three smooth images in [-1, 1], and the same with noise of rising strength."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 6, 6, generator=generator) * 2 - 1
    true = torch.nn.functional.interpolate(coarse, (height_px, width_px), mode="bilinear")
    strength = torch.tensor([0.01, 0.1, 0.6]).view(3, 1, 1, 1)
    noisy = true + strength * torch.randn(true.shape, generator=generator)
    return noisy.clamp(-1, 1), true


def as_numpy(image_CHW: Tensor) -> np.ndarray:
    return ((image_CHW.double() + 1) / 2).movedim(0, -1).numpy()


def test_psnr_equals_the_formula() -> None:
    """A constant error of 0.1 on a range of 2 is 20 log10(2 / 0.1) dB; each image is scored alone."""
    zero = torch.zeros(2, 3, 8, 8)
    image = torch.stack([zero[0] + 0.1, zero[1] - 0.5])
    assert psnr_db(image, zero).tolist() == pytest.approx([20 * math.log10(20), 20 * math.log10(4)], abs=1e-4)
    assert psnr_db(zero, zero).tolist() == [math.inf, math.inf]


def test_psnr_equals_scikit_image() -> None:
    """The same as scikit-image's on the same pictures in [0, 1]."""
    noisy, true = make_pairs()
    for mine, a, b in zip(psnr_db(noisy, true), noisy, true, strict=True):
        assert mine.item() == pytest.approx(peak_signal_noise_ratio(as_numpy(b), as_numpy(a), data_range=1), abs=1e-4)


@pytest.mark.parametrize("size_px", [(40, 52), (11, 11), (11, 30)])
def test_ssim_equals_scikit_image(size_px: tuple[int, int]) -> None:
    """The mean over valid windows of scikit-image's map, with Wang's settings, to 1e-5."""
    noisy, true = make_pairs(*size_px)
    for mine, a, b in zip(ssim(noisy, true), noisy, true, strict=True):
        _, similarity = structural_similarity(
            as_numpy(a), as_numpy(b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1,
            channel_axis=2, full=True,
        )  # fmt: skip
        assert mine.item() == pytest.approx(similarity[5:-5, 5:-5].mean(), abs=1e-5)


def test_ssim_of_equal_images_is_one() -> None:
    """1 for an image and itself, symmetric, and lower with more noise."""
    noisy, true = make_pairs()
    assert torch.allclose(ssim(true, true), torch.ones(3), atol=1e-6)
    assert torch.allclose(ssim(noisy, true), ssim(true, noisy), atol=1e-6)
    assert ssim(noisy, true).diff().max() < 0
