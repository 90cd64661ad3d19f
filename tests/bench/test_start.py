"""What a start costs is measured, and what it may not load. Run: pytest tests/bench/test_start.py"""

import sys
from pathlib import Path

import pytest

from tests.launching import run
from toolkit.bench import start as module
from toolkit.bench.start import Start, bench_start, wait_for
from toolkit.errors import UserError


@pytest.mark.launch
def test_every_start_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, on the smallest recipe: all figures are there and positive, and those of the libraries are the measure."""
    monkeypatch.setattr(module, "DOCTOR_RECIPE", module.STEP_RECIPE)
    monkeypatch.setattr(module, "ENGINES", ())
    report = bench_start(rounds=1)
    helps, doctors = ["train_help", "doctor_help", "interpolate_help"], ["doctor_begins", "doctor_new", "doctor_again"]
    names = ["imports", *helps, *doctors, "first_step_new"]
    assert report["rounds"] == 1 and report["threads"] >= 1 and list(report["starts"]) == names
    for row in report["starts"].values():
        assert row.keys() == {"s", "ratio", "cpu_s", "cpu_ratio"} and min(row.values()) > 0
    assert report["starts"]["imports"]["ratio"] == report["starts"]["imports"]["cpu_ratio"] == 1


def test_a_command_that_fails_is_no_figure(tmp_path: Path) -> None:
    """A wrong end, or an end before the line that was waited for, is told with the command's own words."""
    for code, until in (("raise SystemExit('no such thing')", None), ("print('no')", "step ")):
        with pytest.raises(UserError, match="failed with" + (".*no such thing" if until is None else "")):
            wait_for(Start([sys.executable, "-c", code], until), tmp_path)


@pytest.mark.launch
def test_an_engine_loads_no_compiler() -> None:
    """DeepSpeed's Muon, which no run uses, would load torch's compiler for a second; a step is taken without both."""
    code = """if True:
        import sys, torch
        from toolkit.engine.plain import AdamSettings
        from toolkit.engine.world import init_world
        from toolkit.engine.zero import ZeroEngine
        world, layer = init_world(), torch.nn.Linear(2, 2)
        adam = AdamSettings(weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8, max_grad_norm=1.0)
        engine = ZeroEngine(layer, dict(layer.named_parameters()), adam, 1, 1, {"zero_optimization": {"stage": 2}})
        engine.backward(layer(torch.ones(1, 2)).sum())
        print(engine.step(0.1) > 0, [name for name in ("torch._inductor.compile_fx",) if name in sys.modules])
        engine.close()"""
    assert run([sys.executable, "-c", code]).stdout.splitlines()[-1] == "True []"
