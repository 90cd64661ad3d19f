"""How near generated frames are to the true ones: PSNR, SSIM, LPIPS, FVD, flicker, and how their light drifts.

Test: pytest tests/test_metrics.py (SSIM against scikit-image, Fréchet distances against SciPy). Images are fp32 in [-1, 1],
(B, 3, H, W) in pixels, and videos (B, T, 3, H, W). A level is 1/255 of the range.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import UserError, in_one_line

LEVELS = 127.5  # of 255 in one unit of [-1, 1]
ROUNDING = 1 / 12 / LEVELS**2  # mean squared error of rounding to 8 bits, as every picture here once was: PSNR 58.9 dB
MOVING = 0.2  # in [-1, 1]: a pixel moves where some channel's largest and smallest value differ by more
Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches of images, (B,)
Features = Callable[[Tensor], Tensor]  # of videos, (B, D)


def psnr_db(image_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,); 58.9 for one that is as near as 8 bits can tell.

    Not infinite for equal images, as it is elsewhere: a still scene, which a blend hits exactly, would have no mean.
    """
    return _psnr_db((image_BCHW - true_BCHW).square().mean((1, 2, 3)))


def moving_mask(frames_BTCHW: Tensor) -> Tensor:
    """Where the true colours vary over a video, (B, H, W) bool; it depends on no generated frame, so it favours none."""
    span_BCHW = frames_BTCHW.amax(1) - frames_BTCHW.amin(1)
    return span_BCHW.amax(1) > MOVING


def psnr_moving_db(image_BCHW: Tensor, true_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """PSNR over the pixels of a mask alone, (B,) in dB; NaN for an image where the mask holds none."""
    error_BHW = (image_BCHW - true_BCHW).square().mean(1) * mask_BHW
    return _psnr_db(error_BHW.sum((1, 2)) / mask_BHW.sum((1, 2)))  # 0 / 0 is NaN


def _psnr_db(error_B: Tensor) -> Tensor:
    return 10 * torch.log10(4 / error_B.clamp(min=ROUNDING))  # the range [-1, 1] has peak 2, and 2^2 = 4


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


def flicker(made_BTCHW: Tensor, true_BTCHW: Tensor) -> Tensor:
    """How much more or less unsteady a video is than the true one, (B,) in levels; 0 where it changes as the true one does.

    The mean absolute difference between the second differences in time, x[t-1] - 2 x[t] + x[t+1], of the two: steady motion
    and a steady fade have none, a frame that jumps out and back has twice its jump.
    source  after tLP of Chu et al. 2020 (TecoGAN), which compares first differences by a perceptual distance
    """
    error_BTCHW = made_BTCHW - true_BTCHW
    return LEVELS * error_BTCHW.diff(n=2, dim=1).abs().mean((1, 2, 3, 4))


def lighting_drift(frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """How far the light of the frames between two ends strays from the straight path between that of the ends.

    The light of a frame is the mean of each channel. True frames stray too, so theirs is what to compare with.
    returns  luma_B, colour_B in levels: mean distance of the luma (Rec. 601), and of the channels from their luma
    """
    means_BTC = LEVELS * frames_BTCHW.mean((3, 4))
    time_T1 = torch.linspace(0, 1, means_BTC.shape[1], device=means_BTC.device)[:, None]
    stray_BTC = (means_BTC - torch.lerp(means_BTC[:, :1], means_BTC[:, -1:], time_T1))[:, 1:-1]
    luma_BT1 = (stray_BTC * stray_BTC.new_tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    return luma_BT1.abs().mean((1, 2)), (stray_BTC - luma_BT1).abs().mean((1, 2))


# name, channels in and out, kernel, stride and padding of AlexNet's convolutions, as the lpips package names them
_ALEXNET = (
    ("net.slice1.0", 3, 64, 11, 4, 2), ("net.slice2.3", 64, 192, 5, 1, 2), ("net.slice3.6", 192, 384, 3, 1, 1),
    ("net.slice4.8", 384, 256, 3, 1, 1), ("net.slice5.10", 256, 256, 3, 1, 1),
)  # fmt: skip
_POOLED = ("net.slice2.3", "net.slice3.6")  # what they read
LPIPS_MIN_PX = 31  # below, nothing is left to pool
_MAKE_LPIPS = (
    "make it where the lpips package is: save_file({k: v.clone() for k, v in lpips.LPIPS(net='alex').state_dict().items()}, "
    "'lpips_alex.safetensors')"
)


def load_lpips(path: str | Path) -> Distance:
    """Read the weights of LPIPS (AlexNet) from a safetensors file: a perceptual distance, 0 for equal images.

    raises  UserError where there is no such file, or it holds something else
    source  Zhang et al. 2018, version 0.1: each layer's features, scaled to length 1, differ by so much, weighted by channel
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read LPIPS weights from {path}: {in_one_line(error)}; {_MAKE_LPIPS}") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (name, channels_in, channels, kernel, _, _) in enumerate(_ALEXNET):
        shapes |= {f"{name}.weight": (channels, channels_in, kernel, kernel), f"{name}.bias": (channels,)}
        shapes |= {f"lin{i}.model.1.weight": (1, channels, 1, 1)}
    wrong = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]
    if wrong:
        raise UserError(
            f"{path} holds no weights of LPIPS with AlexNet: {wrong[0]} is not there, or other; {_MAKE_LPIPS}"
        )

    def features(image_BCHW: Tensor) -> list[Tensor]:
        shift, scale = (image_BCHW.new_tensor(v).view(3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
        x = (image_BCHW - shift) / scale
        layers = []
        for name, _, _, _, stride, padding in _ALEXNET:
            x = F.max_pool2d(x, 3, 2) if name in _POOLED else x
            x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding))
            layers.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return layers

    @torch.no_grad()
    def distance(image_BCHW: Tensor, true_BCHW: Tensor) -> Tensor:
        pairs = zip(features(image_BCHW), features(true_BCHW), strict=True)
        apart = [F.conv2d((a - b).square(), weights[f"lin{i}.model.1.weight"]) for i, (a, b) in enumerate(pairs)]
        return torch.stack([map_B1HW.mean((1, 2, 3)) for map_B1HW in apart]).sum(0)

    return distance


FVD_MIN_FRAMES = 9  # I3D halves them three times, and pools two at the end
_I3D_PX = 224


def load_video_features(path: str | Path, frames: int) -> Features:
    """Read I3D as it is published for FVD, or another TorchScript network that is called as it is: a video's features.

    frames  of the videos, FVD_MIN_FRAMES or more
    raises  UserError where there is no such file, or it holds something else
    source  universome/fvd-comparison: forward(x, rescale, resize, return_features), x (B, 3, T, 224, 224) in [-1, 1]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, in which I3D is published
            network = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot read video features for FVD from {path}: {in_one_line(error)}; give i3d_torchscript.pt of "
            "universome/fvd-comparison"
        ) from None

    @torch.no_grad()
    def features(frames_BTCHW: Tensor) -> Tensor:
        clips, frames = frames_BTCHW.shape[:2]
        scaled = F.interpolate(frames_BTCHW.flatten(0, 1), (_I3D_PX, _I3D_PX), mode="bilinear", antialias=True)
        video_BCTHW = scaled.unflatten(0, (clips, frames)).transpose(1, 2)
        return network(video_BCTHW, rescale=False, resize=False, return_features=True)

    try:
        shape = [*features(torch.zeros(1, frames, 3, _I3D_PX, _I3D_PX)).shape]
    except (RuntimeError, AttributeError) as error:
        shape = [in_one_line(error)]
    if len(shape) != 2:
        raise UserError(
            f"{path} makes no row of features of a video of {frames} frames, but {shape}; give i3d_torchscript.pt of "
            "universome/fvd-comparison"
        )
    return features


def frechet_distance(features_ND: Tensor, true_MD: Tensor) -> float:
    """How far two sets of features are apart, each taken for a normal distribution; 0 for equal sets.

    features, true  (N, D) and (M, D), two rows or more each; NaN is returned where a number of them is not finite

    With covariances A'A and B'B the trace of the root of their product is the sum of the singular values of A B', which
    has as many rows as there are clips: exact where these are fewer than the features.
    source  Dowson and Landau 1982; Unterthiner et al. 2019 (FVD)
    """
    if not (features_ND.isfinite().all() and true_MD.isfinite().all()):
        return math.nan
    means, roots = [], []
    for rows in (features_ND.double(), true_MD.double()):
        means.append(rows.mean(0))
        roots.append((rows - means[-1]) / (len(rows) - 1) ** 0.5)
    spreads = sum(root.square().sum() for root in roots)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((means[0] - means[1]).square().sum() + spreads - 2 * shared).item()


def _blur(image_BCHW: Tensor) -> Tensor:
    offset = torch.arange(-5, 6, dtype=image_BCHW.dtype, device=image_BCHW.device)
    weight = torch.exp(-(offset**2) / (2 * 1.5**2))
    weight = (weight / weight.sum()).view(1, 1, 1, 11).expand(image_BCHW.shape[1], 1, 1, 11)
    groups = image_BCHW.shape[1]
    return F.conv2d(F.conv2d(image_BCHW, weight, groups=groups), weight.transpose(2, 3), groups=groups)
