"""The demo behind `make demo`: prepare data, train, stop, resume, test, compare with bicubic.

Every step is the command that a user would type, run from the repository's root. The results are
results/demo/table.md and results/demo/comparison.png.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPTIONS = "demo.yml"
EXPERIMENT = ROOT / "experiments" / "demo"
RESULTS = ROOT / "results" / "demo"
SHIPPED = RESULTS / "shipped"
VALIDATION = ROOT / "datasets" / "demo" / "val" / "X4"

# What is shown of BasicSR's log; all of it is in the log files.
SHOWN = re.compile(
    r"epoch:.*iter:|# (psnr|ssim):|Validation|Saving models|Resuming|End of training"
    r"|complete already|built$|interrupted"
)
TIMESTAMP = re.compile(r"^\S+ \S+ INFO: ")
ITERATION = re.compile(r"epoch:.*iter: *([\d,]+)")
LAST_LINES = 30
INTERRUPTED = 130
# With patches this small a second thread saves a fifth of the time on two idle cores, but takes
# four times as long on shared ones, where threads keep waiting for each other.
THREADS = {"OMP_NUM_THREADS": "1"}


class StepFailed(Exception):
    """A step of the demo failed."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a step's title, and how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   took {time.perf_counter() - start:.1f} s", flush=True)


def _take_interrupts() -> None:
    # Without job control, a shell's background jobs and their children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(
    *arguments: str, stop_when: Callable[[str], bool] = lambda line: False, expect: int = 0
) -> None:
    """Run this Python with `arguments`, and show the lines of its output that show progress.

    Args:
        arguments: A script below the root and its arguments.
        stop_when: Called with each line; when it first returns True, the command is interrupted
            as by Ctrl-C.
        expect: The exit status of success.

    Raises:
        StepFailed: Another exit status; the last lines of the output were shown.
    """
    print(f"   $ python {' '.join(arguments)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**THREADS, **os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_take_interrupts,
    )
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    stopped = False
    with process:
        for line in process.stdout:
            last_lines.append(line)
            if SHOWN.search(line):
                print(f"   {TIMESTAMP.sub('', line).rstrip()}", flush=True)
            if not stopped and stop_when(line):
                stopped = True
                process.send_signal(signal.SIGINT)
    if process.returncode != expect:
        print("".join(last_lines), file=sys.stderr)
        command = f"python {' '.join(arguments)}"
        raise StepFailed(f"`{command}` ended with status {process.returncode}, not {expect}")


def past(iteration: int) -> Callable[[str], bool]:
    """Return a check for lines of the log that show a later iteration than this."""

    def is_past(line: str) -> bool:
        found = ITERATION.search(line)
        return found is not None and int(found[1].replace(",", "")) > iteration

    return is_past


def check_saved(iteration: int) -> None:
    """Check that the training state of this iteration exists and holds this iteration.

    Raises:
        StepFailed: It does not.
    """
    import torch

    path = EXPERIMENT / "training_states" / f"{iteration}.state"
    if not path.is_file():
        raise StepFailed(f"training did not reach iteration {iteration}: {path} does not exist")
    reached = torch.load(path, map_location="cpu")["iter"]
    if reached != iteration:
        raise StepFailed(f"training reached iteration {reached}, not {iteration}: {path}")
    print(f"   iteration reached and saved: {reached}", flush=True)


def compare(iterations: int) -> str:
    """Write the table and the image; returns the table with a line that says what it shows."""
    from dlgsanet_arch.data.bicubic import bicubic
    from dlgsanet_arch.data.images import read_8_bits
    from dlgsanet_arch.tools import figure

    comparisons = []
    for hr_path in sorted((VALIDATION / "HR").glob("*.png")):
        name = hr_path.stem
        paths = {
            "HR": hr_path,
            "LR": VALIDATION / "LR" / hr_path.name,
            "trained just now": RESULTS / "visualization" / "demo_val" / f"{name}_demo.png",
            "bundled weights": SHIPPED / hr_path.name,
        }
        images = {
            label: read_8_bits(path).pixels[..., ::-1].copy() for label, path in paths.items()
        }
        hr, lr = images.pop("HR"), images.pop("LR")
        scale = hr.shape[0] // lr.shape[0]
        results = {"bicubic": bicubic(lr, scale), **images}
        comparisons.append(figure.compare(name, hr, results, scale))
    text = (
        f"x{scale}, a small network after {iterations} iterations and DLGSANet Tiny with the "
        "bundled weights, on photographs that neither training saw: "
        f"PSNR and SSIM of the Y channel, a border of {scale} pixels cut off.\n\n"
        f"{figure.table(comparisons)}"
    )
    (RESULTS / "table.md").write_text(text)
    figure.save(figure.draw(comparisons), RESULTS / "comparison.png")
    return text


def main() -> int:
    """Run all steps; returns the exit status."""
    from dlgsanet_arch import options

    training = options.load(ROOT / "options" / "train" / OPTIONS)
    total = training["train"]["total_iter"]
    saved = training["logger"]["save_checkpoint_freq"]
    train = ("train.py", "-opt", f"options/train/{OPTIONS}")
    start = time.perf_counter()
    try:
        with step("Data: photographs of scikit-image's wheel, LR by MATLAB's bicubic"):
            run("datasets/prepare.py", "demo")
        with step(f"Training, interrupted after its checkpoint at iteration {saved} of {total}"):
            run(*train, stop_when=past(saved), expect=INTERRUPTED)
            check_saved(saved)
        with step("Training resumes from the saved state"):
            run(*train, "--auto_resume")
            check_saved(total)
        with step("Test on photographs that it was not trained on"):
            run("test.py", "-opt", f"options/test/{OPTIONS}")
        with step("The same photographs by the weights that come with the package"):
            run(
                *("-m", "dlgsanet_arch", "upscale", "--device", "cpu"),
                *("-i", "datasets/demo/val/X4/LR", "-o", "results/demo/shipped"),
            )
        with step("Comparison with bicubic"):
            print(f"\n{compare(total)}")
            for name in ("table.md", "comparison.png"):
                print(f"   {(RESULTS / name).relative_to(ROOT)}")
    except StepFailed as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"\ndemo: done in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
