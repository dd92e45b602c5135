"""Faults for real: kills, full disks, damaged files, slow starts; run by `make test-faults`."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from http_server import proxies, serving
from training_runs import Forked, assert_equal, events, make_root, small_options, weights

from dlgsanet_arch.checkpoint import check_complete
from dlgsanet_arch.data import downloads
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.pipeline import evaluation, loop, runs  # noqa: F401 - for what is forked
from dlgsanet_arch.pipeline.checkpoints import numbered
from dlgsanet_arch.pipeline.runs import registered

pytestmark = pytest.mark.faults

TOTAL = 13  # no multiple of val_freq, so that the end validates and saves once more
KILLS, SIGNALS = 15, 10  # of one seed
PATIENCE = 300  # seconds, for a run of one


def options_of(name: str, **train_set) -> dict:
    """A run that writes a checkpoint at every iteration."""
    noisy = {"type": "NoisyNet", "width": 128}  # takes a while to be saved
    return small_options(name, total=TOTAL, save_every=1, **train_set) | {"network_g": noisy}


def folder_of(root: Path, name: str) -> Path:
    return root / "experiments" / name


def newest_pair(run: Path) -> int:
    """Return the iteration of the newest pair; 0 without one."""
    return max((n for n, paths in numbered(run).items() if len(paths) == 2), default=0)


def wait(run: Forked) -> int:
    return run.wait(PATIENCE)


def started(root: Path, options: dict, before: Callable[[], None] | None = None) -> Forked:
    """Resume a run from its newest pair; before the first there is nothing to resume from."""
    folder = folder_of(root, options["name"])
    if newest_pair(folder):
        return Forked(root, options, "--auto_resume", before=before)
    shutil.rmtree(folder, ignore_errors=True)
    return Forked(root, options, before=before)


def completes(root: Path, options: dict) -> None:
    run = started(root, options)
    assert wait(run) == 0, run.said


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    registered()  # imports what the runs need, before they are forked
    return make_root(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(root) -> tuple[dict, float]:
    """The weights of a run that nothing stops, and the seconds it takes."""
    began = time.monotonic()
    completes(root, options_of("undisturbed"))
    return weights(root, "undisturbed"), time.monotonic() - began


def whole_files(run: Path) -> dict[Path, tuple[int, int]]:
    """Read every numbered file to its end; return size and checksum of those that are a pair."""
    found = {
        path: (path.stat().st_size, check_complete(path))
        for paths in numbered(run).values()
        for path in paths
    }
    pairs = [paths for paths in numbered(run).values() if len(paths) == 2]
    return {path: found[path] for path in itertools.chain.from_iterable(pairs)}


def assert_nothing_lost(run: Path, before: dict) -> dict:
    """Compare with the files of the kill before; the end alone writes its pair a second time."""
    now = whole_files(run)
    ended = {path for path in before if path.stem == str(TOTAL)}
    assert {path: now.get(path) for path in before.keys() - ended} == {
        path: found for path, found in before.items() if path not in ended
    }
    assert ended <= now.keys()
    return now


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_moments_lose_nothing(root, undisturbed, seed):
    expected, seconds = undisturbed
    draws, kills = random.Random(seed), 0
    for attempt in itertools.count():
        options = options_of(f"killed_{seed}_{attempt}")
        run_folder, files, status = folder_of(root, options["name"]), {}, None
        while kills < KILLS and status != 0:
            run = started(root, options)
            time.sleep(draws.uniform(0, seconds))
            run.signal(signal.SIGKILL)
            status = wait(run)  # 0 where it was complete before
            assert status in (0, -signal.SIGKILL), run.said
            kills += status != 0
            files = assert_nothing_lost(run_folder, files)
        if status != 0:
            completes(root, options)
            assert_nothing_lost(run_folder, files)
        assert_equal(weights(root, options["name"]), expected)
        if kills == KILLS:
            break


def test_sigterm_at_random_moments_loses_no_iteration(root, undisturbed):
    expected, seconds = undisturbed
    draws, stops = random.Random(3), 0
    for attempt in itertools.count():
        options = options_of(f"stopped_{attempt}")
        options["logger"]["save_checkpoint_freq"] = 1000  # nothing but the signal saves
        run_folder, status = folder_of(root, options["name"]), None
        while stops < SIGNALS and status != 0:
            run = started(root, options)
            time.sleep(draws.uniform(0, seconds))
            run.signal(signal.SIGTERM)
            status = wait(run)  # 0 where it was complete before
            # until it trains the signal acts as it does on any process, which is 143 to a shell
            assert status in (0, 143, -signal.SIGTERM), run.said
            stops += status != 0
            whole_files(run_folder)
            trained = [entry["iter"] for entry in events(root, options["name"], "train")]
            assert newest_pair(run_folder) == max(trained, default=0)
        completes(root, options)
        trained = [entry["iter"] for entry in events(root, options["name"], "train")]
        assert trained == list(range(1, TOTAL + 1))  # each of them once
        assert_equal(weights(root, options["name"]), expected)
        if stops == SIGNALS:
            break


class Cut:
    """A file whose writer dies in its n-th write, with half of it on the disk."""

    def __init__(self, file, calls: Iterator[int], fatal: int) -> None:
        self._file, self._calls, self._fatal = file, calls, fatal

    def write(self, data) -> int:
        if next(self._calls) == self._fatal:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def dying_in(place: str, fatal: int) -> Callable[[], None]:
    """Return what lets a process kill itself at the n-th time that it is at `place` of a save."""

    def install() -> None:
        calls = itertools.count(1)
        if place == "write":
            real_save = torch.save
            torch.save = lambda content, file: real_save(content, Cut(file, calls, fatal))
            return
        owner = Path if place == "unlink" else os
        real = getattr(owner, place)

        def dying(*arguments, **named):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, place, dying)

    return install


# A file is written in some dozens of pieces, flushed with its folder, renamed; old ones go last.
INSIDE = [
    ("fsync", 5),  # in the second save: from here on there is a pair
    *(("write", n) for n in (1, 20, 50, 90, 150)),
    *(("fsync", n) for n in (1, 2, 3, 4)),
    *(("replace", n) for n in (1, 2, 3, 4)),
    *(("unlink", n) for n in (1, 2, 3)),
]
AT_THE_END = [("replace", n) for n in (5, 4, 3, 2, 1)]


def test_kills_inside_a_save_leave_the_only_pair_whole(root, undisturbed):
    options = options_of("cut")
    options["logger"]["keep_last"] = 1
    run_folder, newest, kills = folder_of(root, "cut"), 0, 0

    def kill(place: str, fatal: int) -> None:
        nonlocal newest, kills
        run = started(root, options, dying_in(place, fatal))
        status = wait(run)
        assert status in (0, -signal.SIGKILL), run.said
        kills += status != 0
        whole_files(run_folder)
        assert newest_pair(run_folder) >= newest
        newest = newest_pair(run_folder)

    for place, fatal in INSIDE:
        options["train"]["total_iter"] = 1000  # the kills decide how far it comes
        kill(place, fatal)
    assert kills == len(INSIDE)
    total = options["train"]["total_iter"] = newest + 2
    for place, fatal in AT_THE_END:
        kill(place, fatal)
    completes(root, options)
    uncut = options_of("uncut")
    uncut["train"]["total_iter"] = total
    completes(root, uncut)
    assert_equal(weights(root, "cut"), weights(root, "uncut"))
    assert list(numbered(run_folder)) == [total]
    assert not list(run_folder.rglob("*.unfinished"))


def test_a_run_killed_in_its_very_first_save_can_be_started_the_same_way(root, undisturbed):
    options = options_of("first")
    run = Forked(root, options, "--auto_resume", before=dying_in("replace", 2))  # no state yet
    assert wait(run) == -signal.SIGKILL
    run = Forked(root, options, "--auto_resume")
    assert wait(run) == 0, run.said
    assert_equal(weights(root, "first"), undisturbed[0])


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk with room for `size` bytes, mounted at `folder`; yields what gives it another size."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    mounted = subprocess.run([*command, f"size={size}"], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield lambda size: subprocess.run([*command, f"remount,size={size}"], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def pair_size(root: Path) -> int:
    return sum(path.stat().st_size for path in numbered(folder_of(root, "undisturbed"))[1])


def test_a_full_disk_ends_the_run_and_it_goes_on_with_more_room(root, undisturbed, tmp_path):
    made = make_root(tmp_path)
    options = options_of("full")
    with small_disk(made / "experiments", int(4.5 * pair_size(root))) as resized:
        run = Forked(made, options)
        assert wait(run) == 1
        assert "Traceback" not in run.said
        assert "cannot be written (the disk is full)" in run.said
        assert f"{folder_of(made, 'full')}/" in run.said.splitlines()[-1]  # the file is named
        files = whole_files(folder_of(made, "full"))
        assert newest_pair(folder_of(made, "full")) == 4
        resized(100 * pair_size(root))
        completes(made, options)
        assert_nothing_lost(folder_of(made, "full"), files)
        assert_equal(weights(made, "full"), undisturbed[0])


def test_a_download_that_fills_the_disk_resumes_with_more_room(tmp_path, monkeypatch):
    for name in proxies():
        monkeypatch.delenv(name)
    monkeypatch.setattr(downloads, "check_space", lambda *_: None)  # others fill it meanwhile
    content, target = random.Random(0).randbytes(2**20), tmp_path / "disk" / "set.zip"
    with serving(content) as server, small_disk(target.parent, 2**19) as resized:
        with pytest.raises(UserError, match=r"set\.zip\.part: the disk is full"):
            downloads.download(server.url, target)
        received = target.with_name("set.zip.part").stat().st_size
        assert received > 0
        resized(2**22)
        downloads.download(server.url, target)
        assert target.read_bytes() == content
        assert server.requests[-1]["Range"] == f"bytes={received}-"


@pytest.mark.parametrize("flags", [[], ["--auto_resume"]], ids=["new", "resuming"])
def test_of_two_runs_started_together_one_runs(root, flags):
    name = "together_" + "_".join(flags).strip("-")
    options = options_of(name)
    options["train"]["total_iter"] = 100_000
    options["logger"] |= {"save_checkpoint_freq": 100, "keep_last": 2}
    for attempt in range(3):
        starter = root / f"{name}_{attempt}.go"

        def at_once(starter=starter):
            while not starter.exists():
                pass

        pair = [
            Forked(root, options, *flags, before=at_once, environment={"OUTPUT_RANK": str(number)})
            for number in range(2)
        ]
        time.sleep(0.1)
        starter.touch()
        statuses = {}
        until = time.monotonic() + PATIENCE
        while not statuses:
            assert time.monotonic() < until, "both are at work"
            for run in pair:
                if os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    statuses[run] = wait(run)
            time.sleep(0.01)
        ((loser, status),) = statuses.items()
        (winner,) = (run for run in pair if run is not loser)
        assert status == 1, loser.said
        assert f"the run {name} is being worked on by" in loser.said
        winner.reaches(1)
        winner.signal(signal.SIGTERM)
        assert wait(winner) == 143, winner.said
        whole_files(folder_of(root, name))
        time.sleep(1)  # the name of what is renamed has the second
    folders = sorted(path.name for path in (root / "experiments").glob(f"{name}*"))
    assert len(folders) == (1 if flags else 3), folders
