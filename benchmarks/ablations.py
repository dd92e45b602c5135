"""The paper's ablations in small: equal short trainings of Tiny x4 and its variants, several seeds.

The recipe is that of options/train/tiny_x4_bsds400.yml, shortened; the networks are those of
options/train/tiny_x4*.yml. Run again, the command goes on with what is missing. It writes
results/ablations_<device>.json and docs/ablations.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import reporting
import yaml

from dlgsanet_arch import options

RECIPE = "tiny_x4_bsds400"
FULL = "full"
# By name: the option file below options/train, and what it is in the paper's words.
VARIANTS = {
    FULL: ("tiny_x4", "the paper's network"),
    "no_mhdlsa": ("tiny_x4_no_mhdlsa", "without MHDLSA: global layers alone, with softmax"),
    "no_sparsegsa": ("tiny_x4_no_sparsegsa", "without SparseGSA: local layers alone"),
    "softmax": ("tiny_x4_softmax", "softmax in place of ReLU"),
    "gelu": ("tiny_x4_gelu", "GELU in place of ReLU"),
    "sigmoid": ("tiny_x4_sigmoid", "sigmoid in place of ReLU"),
}
PATCH = 24  # LR pixels
BATCH = 2

Result = dict[str, Any]


def run_options(variant: str, iterations: int, seed: int) -> dict[str, Any]:
    """Return the options of one training."""
    recipe = options.load(reporting.ROOT / "options" / "train" / f"{RECIPE}.yml")
    file, _ = VARIANTS[variant]
    network = options.load(reporting.ROOT / "options" / "train" / f"{file}.yml")["network_g"]
    training = recipe["datasets"]["train"]
    training |= {"gt_size": PATCH * recipe["scale"], "batch_size_per_gpu": BATCH}
    train = recipe["train"]
    train |= {"total_iter": iterations, "warmup_iter": max(1, iterations // 20)}
    train["scheduler"]["periods"] = [iterations]
    train["ema_decay"] = 0.99  # 0.999 would average over most of so short a run
    recipe["val"]["val_freq"] = iterations
    recipe["logger"] |= {"save_checkpoint_freq": iterations, "save_best": None, "keep_last": 1}
    return {
        **recipe,
        "name": f"ablation_{variant}_{iterations}_{seed}",
        "manual_seed": seed,
        "network_g": network,
    }


def train(variant: str, iterations: int, seed: int, root: Path) -> Result:
    """Train one network by this repository's train.py, or go on with it, and read its figures.

    Raises:
        SystemExit: The training failed; what was trained before is kept.
    """
    opt = run_options(variant, iterations, seed)
    file = root / f"{opt['name']}.yml"
    reporting.write_text(file, yaml.safe_dump(opt, sort_keys=False))
    start = time.perf_counter()
    script = [sys.executable, str(reporting.ROOT / "train.py"), "-opt", str(file)]
    said = file.with_suffix(".out")
    with said.open("ab") as out:
        command = [*script, "--root", str(root), "--auto_resume"]
        status = subprocess.run(command, stdout=out, stderr=out).returncode
    if status:
        sys.exit(f"ablations: {opt['name']} ended with status {status}; see {said}")
    log = (root / "experiments" / opt["name"] / "log.jsonl").read_text().splitlines()
    validation = [entry for entry in map(json.loads, log) if entry["event"] == "validation"][-1]
    return {
        "variant": variant,
        "iterations": iterations,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        **validation["metrics"],
    }


def spread(values: Sequence[float], form: str) -> str:
    """Show a mean and the standard deviation of a sample."""
    deviation = format(statistics.stdev(values), form.lstrip("+")) if len(values) > 1 else "–"
    return f"{statistics.fmean(values):{form}} ± {deviation}"


def _of(results: Sequence[Result], variant: str) -> dict[int, Result]:
    return {each["seed"]: each for each in results if each["variant"] == variant}


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Return a line for each variant; differences are between trainings of one seed."""
    full = _of(results, FULL)
    lines = []
    for variant, (_, words) in VARIANTS.items():
        found = _of(results, variant)
        if not found:
            continue
        apart = [found[seed]["psnr"] - full[seed]["psnr"] for seed in found if seed in full]
        shown = "–" if variant == FULL or not apart else spread(apart, "+.3f")
        psnr, ssim = ([each[name] for each in found.values()] for name in ("psnr", "ssim"))
        lines.append([words, str(len(found)), spread(psnr, ".3f"), spread(ssim, ".4f"), shown])
    return lines


def page(result: Mapping[str, Any]) -> str:
    """Write docs/ablations.md from the stored results."""
    described = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    head = ["# The paper's ablations in small", "", f"`{result['command']}` on {described}."]
    table = reporting.table(result["columns"], result["rows"])
    return "\n".join([*head, *result["notes"], "", *table, ""])


def save(
    results: Sequence[Result],
    asked: argparse.Namespace,
    wanted: int,
    environment: Mapping[str, Any],
) -> None:
    """Write the JSON and the page; `environment` is that of the trainings."""
    result = {
        "section": "ablations",
        "kind": asked.device,
        "command": f"python benchmarks/ablations.py --iterations {asked.iterations} --seeds "
        f"{' '.join(map(str, asked.seeds))}",
        "environment": dict(environment),
        "complete": len(results) == wanted,
        "columns": ["network", "seeds", "PSNR, dB", "SSIM", "PSNR − the paper's, same seed, dB"],
        "rows": rows(results),
        "notes": [
            f"Each network was trained for {asked.iterations} iterations of {BATCH} patches of "
            f"{PATCH}x{PATCH} LR pixels of BSDS400,",
            f"with the recipe of options/train/{RECIPE}.yml, shortened, and measured on Set14 x4, "
            "Y.",
            "Means and standard deviations are over the seeds. The paper trains for 500,000 "
            "iterations on DIV2K;",
            "results after so short a training may not hold there.",
            *([] if len(results) == wanted else ["**Incomplete: run the command again.**"]),
        ],
        "raw": list(results),
    }
    path = reporting.RESULTS / f"ablations_{reporting.label(asked.device)}.json"
    reporting.write_text(path, json.dumps(result, indent=1) + "\n")
    reporting.write_text(reporting.ROOT / "docs" / "ablations.md", page(result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--root", type=Path, default=reporting.ROOT, help="holds datasets/, gets experiments/")
    add("--iterations", type=int, default=1000)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--device", choices=("cpu", "cuda"), default="cpu", help="named in the results")
    asked = parser.parse_args(arguments)
    stored = reporting.read(reporting.RESULTS / f"ablations_{reporting.label(asked.device)}.json")
    runs = [(seed, variant) for seed in asked.seeds for variant in VARIANTS]
    results = [
        each
        for each in stored.get("raw", [])
        if each["iterations"] == asked.iterations and (each["seed"], each["variant"]) in runs
    ]
    environment = stored.get("environment", {})
    known = {(each["seed"], each["variant"]) for each in results}
    for number, (seed, variant) in enumerate(runs, start=1):
        if (seed, variant) in known:
            continue
        print(f"{number}/{len(runs)}: {variant}, seed {seed}", flush=True)
        results.append(train(variant, asked.iterations, seed, asked.root.resolve()))
        environment = reporting.environment(asked.device, "ablations")
        save(results, asked, len(runs), environment)
        print(f"  {results[-1]['psnr']:.3f} dB in {results[-1]['seconds']:.0f} s", flush=True)
    save(results, asked, len(runs), environment)  # also where nothing was missing
    return 0


if __name__ == "__main__":
    sys.exit(main())
