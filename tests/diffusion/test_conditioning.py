"""What the UNet reads: layouts, nine channels, tokens, time ids. Run: pytest tests/diffusion/test_conditioning.py"""

import pytest
import torch
from torch import Tensor

from toolkit.diffusion.conditioning import build_input, build_time_ids, build_tokens
from toolkit.diffusion.layout import make_layout

MASK_TOKEN = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 1, 4, 1, 1)


def draw(frames: int) -> tuple[Tensor, Tensor]:
    """Noisy latents of two clips and the latents of their ends."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, frames, 4, 5, 6, generator=generator), torch.randn(2, 2, 4, 5, 6, generator=generator)


@pytest.mark.parametrize("window", [3, 5, 7])
def test_layouts_know_and_score_the_right_frames(window: int) -> None:
    """A clip knows its ends and scores all frames or the middle; the spec's layout is the middle frame alone."""
    middle = window // 2
    clip = make_layout("framer_clip", window)
    assert clip.frames == window and clip.in_window == tuple(range(window))
    assert clip.known_T.nonzero().flatten().tolist() == [0, window - 1] and clip.scored_T.all()
    one = make_layout("middle_in_clip", window)
    assert one.in_window == clip.in_window and torch.equal(one.known_T, clip.known_T)
    assert one.scored_T.nonzero().flatten().tolist() == [middle]
    spec = make_layout("spec_middle", window)
    assert spec.frames == 1 and spec.in_window == (middle,)
    assert spec.known_T.tolist() == [False] and spec.scored_T.tolist() == [True]
    for layout in (clip, one, spec):
        assert layout.window == window and layout.known_T.dtype == layout.scored_T.dtype == torch.bool
        assert layout.known_T.shape == layout.scored_T.shape == (layout.frames,)


@pytest.mark.parametrize("window", [1, 2, 4, 6, 0, -3])
@pytest.mark.parametrize("name", ["spec_middle", "framer_clip", "middle_in_clip"])
def test_windows_without_a_middle_are_refused(name: str, window: int) -> None:
    """Even windows, and those without a frame between the ends, are refused with their length."""
    with pytest.raises(ValueError, match=f"window of {window} frames: .*odd and at least 3"):
        make_layout(name, window)


def test_unknown_layout_is_refused() -> None:
    """The error lists the layouts."""
    with pytest.raises(ValueError, match="'midle'.*spec_middle, framer_clip or middle_in_clip"):
        make_layout("midle", 5)


@pytest.mark.parametrize("name", ["framer_clip", "middle_in_clip"])
@pytest.mark.parametrize("window", [3, 5])
def test_clip_channels_are_noisy_cond_mask(name: str, window: int) -> None:
    """[0:4] noisy as given; [4:8] first, mask token between, last; [8] 0 where known, 1 where to generate."""
    x, ends = draw(window)
    built = build_input(x, ends, MASK_TOKEN, make_layout(name, window))
    assert built.shape == (2, window, 9, 5, 6)
    assert torch.equal(built[:, :, :4], x)
    assert torch.equal(built[:, 0, 4:8], ends[:, 0]) and torch.equal(built[:, -1, 4:8], ends[:, 1])
    assert torch.equal(built[:, 1:-1, 4:8], MASK_TOKEN.expand(2, window - 2, 4, 5, 6))
    assert not built[:, [0, -1], 8].any() and (built[:, 1:-1, 8] == 1).all()


def test_spec_middle_reads_the_mean_of_the_ends() -> None:
    """One frame: noisy, the average of the two end latents, mask 1; the mask token is not used."""
    x, ends = draw(1)
    built = build_input(x, ends, MASK_TOKEN * float("nan"), make_layout("spec_middle", 5))
    assert built.shape == (2, 1, 9, 5, 6) and torch.equal(built[:, :, :4], x)
    assert torch.allclose(built[:, 0, 4:8], (ends[:, 0] + ends[:, 1]) / 2) and (built[:, :, 8] == 1).all()


@pytest.mark.parametrize("name", ["spec_middle", "framer_clip"])
def test_input_keeps_the_noisy_latents_dtype_and_its_arguments(name: str) -> None:
    """The result has the dtype of the noisy latents, whatever base and VAE are in; nothing is written in place."""
    layout = make_layout(name, 3)
    x, ends = draw(layout.frames)
    given = x.clone(), ends.clone(), MASK_TOKEN.clone()
    built = build_input(x, ends.bfloat16(), MASK_TOKEN.bfloat16(), layout)
    assert built.dtype == torch.float32
    built.zero_()
    assert all(torch.equal(a, b) for a, b in zip(given, (x, ends, MASK_TOKEN), strict=True))


def test_tokens() -> None:
    """first_last gives both embeddings in that order, mean their average as one token; others are refused."""
    embeds = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_tokens(embeds, "first_last"), embeds)
    mean = build_tokens(embeds, "mean")
    assert mean.shape == (2, 1, 7) and torch.allclose(mean[:, 0], (embeds[:, 0] + embeds[:, 1]) / 2)
    with pytest.raises(ValueError, match="'first'.*first_last or mean"):
        build_tokens(embeds, "first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
def test_time_ids(dtype: torch.dtype) -> None:
    """[fps - 1, motion bucket, noise augmentation] for each clip, fp32, also from whole numbers."""
    ids = build_time_ids(torch.tensor([7, 30], dtype=dtype), torch.tensor([127, 3], dtype=dtype), 0.25)
    assert ids.dtype == torch.float32 and ids.tolist() == [[6, 127, 0.25], [29, 3, 0.25]]
