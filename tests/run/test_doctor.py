"""The spec's run, looked over without weights: the spec's figures come out. Run: pytest tests/run/test_doctor.py"""

import json
import sys

import pytest

from tests.launching import RECIPE, run
from toolkit.config import load_config
from toolkit.errors import UserError
from toolkit.run.doctor import examine


@pytest.mark.launch
def test_doctor_counts_the_specs_adapter() -> None:
    """128 modules, 13,279,232 parameters, 53.1 MB on a base of 1.52 billion; stdout is JSON and nothing else."""
    done = run([sys.executable, "launch/doctor.py", "--config", "launch/recipes/sign_576.yaml", "--json"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["lora_modules"], report["lora_params"]) == (128, 13_279_232)
    assert (report["base_params"], report["adapter_mb_fp32"]) == (1_524_625_966, 53.1)
    assert report["accumulation"] == 8


def test_doctor_refuses_what_the_run_would_refuse() -> None:
    """A batch that the ranks cannot share, and a DeepSpeed file that is not there."""
    with pytest.raises(UserError, match="global batch of 8 .* 3 ranks"):
        examine(load_config(RECIPE, {"engine.micro_batch": 1}), ranks=3)
    with pytest.raises(UserError, match="cannot read engine.deepspeed nowhere.json"):
        examine(load_config(RECIPE, {"engine.deepspeed": "nowhere.json"}), ranks=1)


def test_doctor_notes_what_is_probably_not_meant() -> None:
    """A warmup that outlasts the run, one token, and temporal layers on one frame."""
    report = examine(
        load_config(
            RECIPE, {"schedule.steps": 5, "schedule.warmup_steps": 5, "diffusion.clip_tokens": "mean", "lora.targets": "all"}
        ),
        ranks=2,
    )  # fmt: skip
    notes = " ".join(report["notes"])
    assert "never reaches its peak" in notes and "cross-attention Q and K cannot learn" in notes
    assert "temporal self-attention Q and K cannot learn" in notes
