"""The benchmark measures real steps. Run: pytest tests/bench/test_full.py"""

import pytest

from tests.model.conftest import SMALL
from toolkit.bench import full
from toolkit.bench.loader import Scale, bench_loader
from toolkit.config import DataConfig, EngineConfig, LoraConfig, RunConfig

SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4,
             "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 0.18215, "force_upcast": True}  # fmt: skip
SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "projection_dim": 16, "image_size": 224, "patch_size": 32}  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_full_bench_runs_both_steps(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """On a small network: both steps take time, the loss is that of an untrained network on unit noise."""
    monkeypatch.setattr(full, "SVD_CONFIG", {**SMALL, "in_channels": 8})
    monkeypatch.setattr(full, "VAE_CONFIG", SMALL_VAE)
    monkeypatch.setattr(full, "CLIP_CONFIG", SMALL_CLIP)
    config = RunConfig(
        name="bench",
        data=DataConfig(shards="", frames=3, height=64, width=64),
        lora=LoraConfig(rank=2, alpha=2),
        engine=EngineConfig(precision=precision),
    )
    report = full.bench_full(config)
    assert set(report["kernels"]) == {"sdpa"} and report["frames"] == 3 and report["precision"] == precision
    row = report["kernels"]["sdpa"]
    assert 0 < row["loss"] < 2 and 0 <= row["sample_mean_abs"] <= 1
    assert row["forward_backward_s"] > 0 and row["optimizer_s"] > 0 and row["sample_s"] > 0 and row["peak_gib"] > 0


def test_loader_bench_measures_all_contenders() -> None:
    """At a hundredth of its size: every figure it promises, positive, with the same clips read by all."""
    small = Scale(cached_clips=16, latent_px=8, video_px=64, video_frames=30, order_clips=320, leak_clips=400, rounds=1)
    report = bench_loader(small)
    assert set(report) == {"cached_clips_per_s", "decode_clips_per_s", "resume_ms", "rss_growth_kb_per_clip"}
    assert set(report["cached_clips_per_s"]) == {"ours", "webdataset", "tarfile", "ram"}
    assert set(report["decode_clips_per_s"]) == {"gop12", "gop250"}
    speeds = [report["cached_clips_per_s"], *report["decode_clips_per_s"].values()]
    assert set(speeds[1]) == set(speeds[2]) == {"ours", "webdataset", "naive"}
    assert all(speed > 0 for row in speeds for speed in row.values())
