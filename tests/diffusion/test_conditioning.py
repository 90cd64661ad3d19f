"""What the UNet reads: layouts, nine channels, tokens, time ids. Run: pytest tests/diffusion/test_conditioning.py"""

import pytest
import torch
from torch import Tensor

from toolkit.diffusion.conditioning import (
    build_input,
    build_time_ids,
    build_tokens,
    drop_conditioning,
    guidance_T,
    guide,
    make_unconditional,
)
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
    """Even windows where the middle counts, and those without a frame between the ends, are refused with their length."""
    if name == "framer_clip" and window > 2:  # Framer itself was trained on 14 frames
        assert make_layout(name, window).frames == window and make_layout(name, window).scored_T.all()
        return
    with pytest.raises(ValueError, match=f"window of {window} frames: .*at least 3, and odd but in framer_clip"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_token_can_be_trained(dtype: torch.dtype) -> None:
    """Its gradient is the sum over the frames and places it stands in, in its own dtype; the known frames send none."""
    x, ends = draw(5)
    token = MASK_TOKEN.to(dtype, copy=True).requires_grad_()
    built = build_input(x, ends, token, make_layout("middle_in_clip", 5))
    weight_T = torch.tensor([100.0, 1.0, 2.0, 4.0, 100.0]).view(5, 1, 1, 1)
    (built * weight_T).sum().backward()
    assert token.grad.dtype == dtype and (token.grad == 2 * 5 * 6 * 7).all()  # clips x height x width x (1 + 2 + 4)


def test_tokens() -> None:
    """first_last gives both embeddings in that order, first one, mean their average as one; others are refused."""
    embeds = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_tokens(embeds, "first_last"), embeds)
    mean = build_tokens(embeds, "mean")
    assert mean.shape == (2, 1, 7) and torch.allclose(mean[:, 0], (embeds[:, 0] + embeds[:, 1]) / 2)
    assert torch.equal(build_tokens(embeds, "first"), embeds[:, :1])
    with pytest.raises(ValueError, match="'last'.*first_last, first or mean"):
        build_tokens(embeds, "last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
def test_time_ids(dtype: torch.dtype) -> None:
    """[fps - 1, motion bucket, noise augmentation] for each clip, fp32, also from whole numbers."""
    ids = build_time_ids(torch.tensor([7, 30], dtype=dtype), torch.tensor([127, 3], dtype=dtype), 0.25)
    assert ids.dtype == torch.float32 and ids.tolist() == [[6, 127, 0.25], [29, 3, 0.25]]


def test_conditioning_is_dropped_by_thirds() -> None:
    """r < p loses the tokens, r < 2p both, r < 3p the ends; the other clips keep all."""
    ends, tokens = torch.ones(8, 2, 4, 5, 6), torch.ones(8, 2, 7)
    r_B = torch.tensor([0.0, 0.124, 0.125, 0.249, 0.25, 0.374, 0.375, 0.999])
    kept_ends, kept_tokens = drop_conditioning(ends, tokens, r_B, 0.125)
    assert [bool(clip.any()) for clip in kept_tokens] == [False] * 4 + [True] * 4
    assert [bool(clip.any()) for clip in kept_ends] == [True] * 2 + [False] * 4 + [True] * 2
    assert set(kept_ends.unique().tolist()) == set(kept_tokens.unique().tolist()) == {0.0, 1.0}
    assert ends.all() and tokens.all()  # what came in is as it was


def test_conditioning_is_dropped_at_its_rate() -> None:
    """Over many clips tokens and ends are each lost in 2p of them, both in p; at rate 0 nothing ever is."""
    r_B = (torch.arange(1000) + 0.5) / 1000
    ends, tokens = drop_conditioning(torch.ones(1000, 2, 1, 1, 1), torch.ones(1000, 1, 1), r_B, 0.1)
    no_ends, no_tokens = ends[:, 0, 0, 0, 0] == 0, tokens[:, 0, 0] == 0
    assert (no_ends.sum(), no_tokens.sum(), (no_ends & no_tokens).sum()) == (200, 200, 100)
    ends, tokens = drop_conditioning(torch.ones(1000, 2, 1, 1, 1), torch.ones(1000, 1, 1), r_B, 0.0)
    assert ends.all() and tokens.all()


def test_unconditional_branch_keeps_mask_and_mask_token() -> None:
    """Zeros for tokens and ends, which then stand in the input beside mask and mask token as in Framer's pipeline."""
    x, ends = draw(5)
    layout = make_layout("framer_clip", 5)
    no_ends, no_tokens = make_unconditional(ends, torch.ones(2, 2, 7))
    assert no_tokens.shape == (2, 2, 7) and not no_tokens.any()
    built, given = (build_input(x, e, MASK_TOKEN, layout) for e in (no_ends, ends))
    assert not built[:, [0, -1], 4:8].any()
    assert torch.equal(built[:, 1:-1], given[:, 1:-1]) and torch.equal(built[:, :, 8], given[:, :, 8])


def test_guidance_rises_over_the_window() -> None:
    """Framer's linspace(1, 3) by frame; a layout of the middle frame alone gets the middle's."""
    assert guidance_T(1.0, 3.0, make_layout("framer_clip", 5)).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_T(1.0, 3.0, make_layout("spec_middle", 5)).tolist() == [2.0]


def test_guide_weighs_each_frame_by_its_scale() -> None:
    """Scale 0 is the unconditional answer, 1 the conditional, 2 as far beyond it; equal answers stay as they are."""
    conditional, unconditional = torch.randn(2, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    guided = guide(conditional, unconditional, torch.tensor([0.0, 1.0, 2.0]))
    wanted = [unconditional[:, 0], conditional[:, 1], 2 * conditional[:, 2] - unconditional[:, 2]]
    assert torch.allclose(guided, torch.stack(wanted, dim=1), rtol=0, atol=1e-5)
    assert torch.equal(guide(conditional, conditional, torch.tensor([0.0, 1.0, 7.5])), conditional)
