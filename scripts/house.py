"""Print how large the house is and what each way in imports: lines, functions, modules, seconds.

    python scripts/house.py

Lines are all lines of Python, comments and docstrings included. Times are the best of five fresh
processes on this machine, Python's own start in them.
"""

import ast
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dlgsanet_arch"
HEAVY = ("torch", "torchvision", "basicsr", "numpy", "cv2", "lmdb", "scipy", "PIL", "yaml")
LONG_FUNCTION, LONG_FILE = 60, 450


def lines_of(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text().splitlines())


def print_rooms() -> None:
    """Print lines of Python for each room of the package, and of what lies beside it."""
    rooms = Counter()
    for path in PACKAGE.rglob("*.py"):
        inner = path.relative_to(PACKAGE).parts
        rooms[inner[0] + ("/" if len(inner) > 1 else "")] += lines_of(path)
    for room, count in sorted(rooms.items()):
        print(f"{room:<20} {count:>6}")
    print(f"{'dlgsanet_arch':<20} {rooms.total():>6}")
    for folder in ("tests", "scripts", "examples", "benchmarks"):
        print(f"{folder:<20} {sum(map(lines_of, (ROOT / folder).rglob('*.py'))):>6}")
    print(f"{'C':<20} {sum(map(lines_of, PACKAGE.glob('cpu/*.[ch]'))):>6}")
    print(f"{'README.md':<20} {lines_of(ROOT / 'README.md'):>6}")


def print_long() -> None:
    """Print files and functions over the guide values."""
    print(f"\nfiles over {LONG_FILE} lines, functions over {LONG_FUNCTION}")
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if lines_of(path) > LONG_FILE:
            print(f"{lines_of(path):>6} {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONG_FUNCTION:
                    print(f"{length:>6} {name}:{node.name}")


def print_import(title: str, code: str) -> None:
    """Print how long a fresh process takes for this code, and what it imports of HEAVY."""
    say = f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nfinally: {say}"
    seconds, found = [], ""
    for _ in range(5):
        start = time.perf_counter()
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        found = (ran.stderr.splitlines() or [""])[-1]
    print(f"{title:<28} {min(seconds):>6.2f} s  {found or 'the standard library alone'}")


def main() -> None:
    """Print everything."""
    print_rooms()
    print_long()
    print("\nimports")
    print_import("python", "pass")
    print_import("import dlgsanet_arch", "import dlgsanet_arch")
    print_import("from … import DLGSANet", "from dlgsanet_arch import DLGSANet")
    print_import("from … import Upscaler", "from dlgsanet_arch import Upscaler")
    run = "from dlgsanet_arch.cli import VERBS, main; main({!r})".format
    for words in (["--version"], ["--help"]):
        print_import(f"dlgsanet {words[0]}", run(words))
    sys.path.insert(0, str(ROOT))
    from dlgsanet_arch.cli import VERBS  # noqa: TID251 - each of them is asked for its help

    for verb in VERBS:
        print_import(f"dlgsanet {verb} --help", run([verb, "--help"]))


if __name__ == "__main__":
    main()
