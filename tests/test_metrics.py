"""Figures against independent references and made-up sequences. Run: pytest tests/test_metrics.py"""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.metrics import (
    flicker,
    frechet_distance,
    lighting_drift,
    load_lpips,
    load_video_features,
    moving_mask,
    psnr_db,
    psnr_moving_db,
    ssim,
)

LEVEL = 2 / 255  # in [-1, 1]


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


def moving_square(frames: int = 5) -> Tensor:
    """A bright square that walks over a dark ground, and beside it a still picture: (2, T, 3, 16, 24)."""
    video = torch.full((2, frames, 3, 16, 24), -0.5)
    for t in range(frames):
        video[0, t, :, 4:8, 2 + 3 * t : 6 + 3 * t] = 0.7
    return video


def test_what_moves_is_where_true_colours_vary() -> None:
    """The square's path in one channel is enough; a change of a tenth of the range is none, one above it is."""
    video = moving_square()
    path = torch.zeros(16, 24, dtype=torch.bool)
    path[4:8, 2:18] = True
    assert torch.equal(moving_mask(video)[0], path) and not moving_mask(video)[1].any()
    video[0, :, :2] = 0  # it is seen in the last channel alone
    assert torch.equal(moving_mask(video)[0], path)
    video[1, 2, 1, 3, 3] += 0.2 - 1e-4
    assert not moving_mask(video)[1].any()
    video[1, 2, 1, 3, 3] += 2e-4
    assert moving_mask(video)[1].nonzero().tolist() == [[3, 3]]


def test_psnr_where_it_moves_equals_numpy() -> None:
    """Of the mask's pixels alone, whatever stands elsewhere; NaN for an image that has none."""
    noisy, true = make_pairs()
    mask = torch.rand(3, 40, 52, generator=torch.Generator().manual_seed(1)) > 0.7
    for i, mine in enumerate(psnr_moving_db(noisy, true, mask).tolist()):
        a, b, chosen = as_numpy(noisy[i]), as_numpy(true[i]), mask[i].numpy()
        assert mine == pytest.approx(-10 * np.log10(np.square(a[chosen] - b[chosen]).mean()), abs=1e-4)
    elsewhere = torch.where(mask[:, None], noisy, torch.ones_like(noisy))
    assert torch.equal(psnr_moving_db(elsewhere, true, mask), psnr_moving_db(noisy, true, mask))
    mask[1] = False
    assert psnr_moving_db(noisy, true, mask).isnan().tolist() == [False, True, False]
    assert torch.allclose(psnr_moving_db(noisy, true, torch.ones_like(mask)), psnr_db(noisy, true))


def test_equal_images_score_what_rounding_to_8_bits_costs() -> None:
    """Not infinity, so that a clip which one contender hits exactly still counts in the means of all of them."""
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    rounded, everywhere = ((image + 1) * 127.5).round() / 127.5 - 1, torch.ones(1, 256, 256, dtype=torch.bool)
    ceiling = psnr_db(image, image).item()
    assert ceiling == pytest.approx(psnr_db(rounded, image).item(), abs=0.05) == pytest.approx(58.92, abs=0.05)
    assert psnr_moving_db(image, image, everywhere).item() == ceiling
    assert psnr_db(image + 0.01, image).item() < ceiling, "what can be told apart is not capped"


def test_flicker_is_what_jumps_out_of_the_course() -> None:
    """0 for the true video, and with a steady error or fade on it; a frame of three that is off by 10 levels has 20."""
    video = moving_square()
    fade = torch.linspace(0, 0.3, 5).view(1, 5, 1, 1, 1)
    for change in (0, 0.1, fade):
        assert flicker(video + change, video).tolist() == pytest.approx([0, 0], abs=1e-4)
    made = video.clone()[:, :3]
    made[1, 1] += 10 * LEVEL
    assert flicker(made, video[:, :3]).tolist() == pytest.approx([0, 20], abs=1e-4)
    # of five frames the middle one: second differences of 10, 20 and 10
    made = video.clone()
    made[0, 2] -= 10 * LEVEL
    assert flicker(made, video).tolist() == pytest.approx([40 / 3, 0], abs=1e-4)
    # a blend that does not move is as unsteady as the true video is: numpy's own second differences
    still = video[:, :1].expand_as(video)
    assert flicker(still, video)[0].item() == pytest.approx(
        np.abs(np.diff(video[0].numpy(), n=2, axis=0)).mean() * 127.5, rel=1e-5
    )


def test_lighting_is_measured_against_the_path_between_the_ends() -> None:
    """None where nothing changes, or light and colour go straight from one end to the other; known drifts are found."""
    video = moving_square()[1:].expand(3, -1, -1, -1, -1).clone()
    video[1] += torch.linspace(0, 0.4, 5).view(5, 1, 1, 1) * torch.tensor([1.0, -0.5, 0.2]).view(3, 1, 1)
    luma, colour = lighting_drift(video)
    assert [*luma.tolist(), *colour.tolist()] == pytest.approx([0] * 6, abs=1e-4)
    video[0, 1:4] += 6 * LEVEL  # all frames between are lighter: no colour
    video[1, 2] -= 6 * LEVEL  # the middle of three is darker
    video[2, 1:4, 2] += 9 * LEVEL  # more blue: luma 9 x 0.114, and what is left of each channel
    luma, colour = lighting_drift(video)
    blue = 9 * 0.114
    assert luma.tolist() == pytest.approx([6, 2, blue], abs=1e-4)
    assert colour.tolist() == pytest.approx([0, 0, (2 * blue + 9 - blue) / 3], abs=1e-4)


def lpips_weights() -> dict[str, Tensor]:
    """Weights under the names of the lpips package's own state, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    layers = {"slice1.0": (64, 3, 11), "slice2.3": (192, 64, 5), "slice3.6": (384, 192, 3), "slice4.8": (256, 384, 3),
              "slice5.10": (256, 256, 3)}  # fmt: skip
    weights = {}
    for i, (name, (channels, inputs, kernel)) in enumerate(layers.items()):
        shape = (channels, inputs, kernel, kernel)
        weights[f"net.{name}.weight"] = torch.randn(shape, generator=generator) / (inputs * kernel**2) ** 0.5
        weights[f"net.{name}.bias"] = torch.randn(channels, generator=generator) * 0.1
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return weights


def test_lpips_equals_its_definition(tmp_path: Path) -> None:
    """Zhang et al. 2018, eq. 1, on AlexNet built of torch's own layers in fp64; 0 for equal images, symmetric."""
    weights = lpips_weights()
    save_file(weights, tmp_path / "alex.safetensors")
    distance = load_lpips(tmp_path / "alex.safetensors")
    noisy, true = make_pairs()
    # torchvision's AlexNet.features, up to the last activation
    alexnet = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    alexnet.load_state_dict({n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith("net.")})
    alexnet.double()
    layers = {0: 1, 1: 4, 2: 7, 3: 9, 4: 11}  # the activations that are compared
    mean, std = np.array([-0.03, -0.088, -0.188]), np.array([0.458, 0.448, 0.45])
    for i in range(3):
        features = []
        for image_CHW in (noisy[i], true[i]):
            x = torch.from_numpy((image_CHW.double().movedim(0, -1).numpy() - mean) / std).movedim(-1, 0)[None]
            features.append([alexnet[: last + 1](x)[0].detach() for last in layers.values()])
        expected = 0.0
        for layer, (a, b) in enumerate(zip(*features, strict=True)):
            unit_a, unit_b = (f / torch.linalg.vector_norm(f, dim=0) for f in (a, b))
            apart_HW = torch.einsum(
                "chw,c->hw", (unit_a - unit_b) ** 2, weights[f"lin{layer}.model.1.weight"][0, :, 0, 0].double()
            )
            expected += apart_HW.mean().item()
        assert distance(noisy, true)[i].item() == pytest.approx(expected, rel=1e-4)
    assert distance(true, true).tolist() == [0, 0, 0]
    assert torch.allclose(distance(noisy, true), distance(true, noisy)) and distance(noisy, true).diff().min() > 0


def test_other_files_are_no_lpips(tmp_path: Path) -> None:
    """Nothing there, no safetensors, a tensor missing or of another shape: told with the way to make them."""
    path = tmp_path / "alex.safetensors"
    with pytest.raises(UserError, match=r"cannot read LPIPS weights from .*; make it where the lpips package is"):
        load_lpips(path)
    path.write_bytes(b"PK pickled")
    with pytest.raises(UserError, match="cannot read LPIPS weights"):
        load_lpips(path)
    weights = lpips_weights()
    del weights["lin4.model.1.weight"]
    save_file(weights, path)
    with pytest.raises(UserError, match=r"lin4\.model\.1\.weight is not there, or other"):
        load_lpips(path)
    save_file(lpips_weights() | {"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(UserError, match=r"net\.slice1\.0\.weight is not there"):
        load_lpips(path)


class MeanColours(nn.Module):
    """Called as I3D is: the mean colour of each frame, (B, 3 T), and one number for each video without return_features."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert x.shape[3] == 224 and x.shape[4] == 224 and not rescale and not resize
        means = x.mean((3, 4)).flatten(1)
        return means if return_features else means.mean(1)


def save_video_network(path: Path, network: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is what I3D is published in
        torch.jit.script(network).save(path)
    return str(path)


def test_a_network_of_video_features_is_called_as_i3d_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Channels before time, 224 pixels wide and high, its features and not its classes; without a warning to the user."""
    path = save_video_network(tmp_path / "i3d.pt", MeanColours())
    recwarn.clear()
    features = load_video_features(path, 10)
    colours_BTC = torch.rand(2, 10, 3) * 2 - 1
    made_BD = features(colours_BTC[..., None, None].expand(2, 10, 3, 32, 48))
    assert torch.allclose(made_BD, colours_BTC.transpose(1, 2).flatten(1), atol=1e-5)
    assert not recwarn.list


class Frames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class NoFeatures(nn.Module):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return x.mean((1, 2, 3, 4))


def test_other_files_make_no_video_features(tmp_path: Path) -> None:
    """Nothing there, no TorchScript, a network that is called otherwise or makes something else: told with what to give."""
    path = tmp_path / "i3d.pt"
    with pytest.raises(UserError, match=r"cannot read video features for FVD from .*; give i3d_torchscript.pt"):
        load_video_features(path, 10)
    path.write_bytes(b"PK pickled")
    with pytest.raises(UserError, match="cannot read video features for FVD"):
        load_video_features(path, 10)
    for network in (Frames(), NoFeatures()):
        with pytest.raises(
            UserError, match=r"makes no row of features of a video of 10 frames, .*; give i3d_torchscript.pt"
        ):
            load_video_features(save_video_network(path, network), 10)


@pytest.mark.parametrize("clips", [40, 3], ids=["more clips than features", "fewer"])
def test_frechet_distance_equals_its_definition(clips: int) -> None:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) by SciPy's root of a matrix; 0 for equal sets, and symmetric."""
    generator = torch.Generator().manual_seed(0)
    first_ND = torch.randn(clips, 6, generator=generator)
    second_MD = 0.7 * torch.randn(clips + 2, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 0.3
    (mean_1, cov_1), (mean_2, cov_2) = (
        (rows.mean(0).double().numpy(), np.cov(rows.double().numpy(), rowvar=False)) for rows in (first_ND, second_MD)
    )
    if clips > 6:
        root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    else:  # SciPy's root of a singular matrix is not exact; that of S1^(1/2) S2 S1^(1/2), which has the same trace, is
        values, vectors = np.linalg.eigh(cov_1)
        half = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
        root = np.diag(np.sqrt(np.linalg.eigvalsh(half @ cov_2 @ half).clip(0)))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(first_ND, second_MD) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second_MD, first_ND) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first_ND, first_ND) == pytest.approx(0, abs=1e-9)
    first_ND[0, 0] = torch.inf
    assert math.isnan(frechet_distance(first_ND, second_MD)) and math.isnan(frechet_distance(second_MD, first_ND))
