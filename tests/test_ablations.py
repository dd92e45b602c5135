"""The ablations in small: what is trained, the figures made of it, and resuming."""

import json
import statistics
from pathlib import Path

import ablations
import pytest
import reporting

from dlgsanet_arch import options

ROOT = Path(__file__).resolve().parent.parent


def test_trainings_differ_in_the_network_alone():
    full = ablations.run_options("full", 100, 3)
    assert full["manual_seed"] == 3
    assert full["train"]["total_iter"] == sum(full["train"]["scheduler"]["periods"]) == 100
    for variant, (file, _) in ablations.VARIANTS.items():
        other = ablations.run_options(variant, 100, 3)
        shipped = options.load(ROOT / "options" / "train" / f"{file}.yml")
        assert other["network_g"] == shipped["network_g"]
        assert (other["network_g"] == full["network_g"]) == (variant == "full")
        own = {name: full[name] for name in ("network_g", "name")}
        assert {**other, **own} == full


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Stands for trainings of an hour; the pages go to a temporary folder."""
    calls = []
    monkeypatch.setattr(reporting, "RESULTS", tmp_path / "results")
    (tmp_path / "options").symlink_to(ROOT / "options")
    monkeypatch.setattr(reporting, "ROOT", tmp_path)
    psnr = {"full": 26.5, "no_mhdlsa": 26.0, "no_sparsegsa": 26.1}

    def train(variant, iterations, seed, root):
        if len(calls) == calls_allowed[0]:
            raise KeyboardInterrupt
        calls.append((variant, seed))
        value = psnr.get(variant, 26.4) + seed / 8 * (1 if variant == "full" else 2)
        return {
            **{"variant": variant, "iterations": iterations, "seed": seed, "seconds": 1.0},
            **{"psnr": value, "ssim": 0.7},
        }

    calls_allowed = [8]
    monkeypatch.setattr(ablations, "train", train)
    return calls, calls_allowed, tmp_path


def test_means_spreads_and_differences(trained):
    calls, allowed, folder = trained
    asked = ["--iterations", "10", "--seeds", "0", "1"]
    with pytest.raises(KeyboardInterrupt):
        ablations.main(asked)
    page = (folder / "docs" / "ablations.md").read_text()
    assert "Incomplete" in page
    allowed[0] = 100
    assert ablations.main(asked) == 0
    assert len(calls) == len(set(calls)) == 12  # nothing was trained twice
    page = (folder / "docs" / "ablations.md").read_text()
    assert "Incomplete" not in page
    deviation = statistics.stdev([26.0, 26.25])
    assert f"| 2 | 26.125 ± {deviation:.3f} |" in page
    # seeds 0 and 1: 26.0 - 26.5 and 26.25 - 26.625
    apart = statistics.stdev([-0.5, -0.375])
    assert f"-0.438 ± {apart:.3f}" in page or f"-0.437 ± {apart:.3f}" in page
    stored = json.loads((folder / "results" / "ablations_cpu.json").read_text())
    assert stored["complete"]
    assert len(stored["raw"]) == 12


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.sys, "executable", "false")
    with pytest.raises(SystemExit, match=r"ablation_gelu_10_0 ended with status 1"):
        ablations.train("gelu", 10, 0, tmp_path)
