import pickle
from hashlib import sha256
from itertools import product

import cv2
import numpy as np
import pytest

from dlgsanet_arch.data import overlap
from dlgsanet_arch.data.overlap import (
    CELL,
    PATCH,
    SURE,
    Overlap,
    TrainingPatches,
    patches_of,
    pixel_digest,
)


def noise(*size: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    white = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, white, (*size, 3), dtype, endpoint=True)


def trained(**pictures: np.ndarray) -> TrainingPatches:
    return TrainingPatches((name, patches_of(picture)) for name, picture in pictures.items())


@pytest.fixture(scope="module")
def photographs(shared_data) -> list[np.ndarray]:
    paths = sorted(shared_data.glob("data/BSDS400/*.jpg"))[:60]
    if not paths:
        pytest.skip(f"no photographs in {shared_data / 'data/BSDS400'}")
    return [cv2.imread(str(path)) for path in paths]


def test_crops_of_photographs_are_found_and_others_are_not(photographs):
    rng = np.random.default_rng(0)
    places, crops = [], {}
    for number, photograph in enumerate(photographs[:30]):
        row, column = (int(rng.integers(0, side - 200 + 1)) for side in photograph.shape[:2])
        places.append((row, column))
        crops[str(number)] = photograph[row : row + 200, column : column + 200]
    training = trained(**crops)
    for number, photograph in enumerate(photographs):
        found = training.find(photograph)
        if number >= 30:
            assert found == []
            continue
        (only,) = found
        assert (only.name, (only.row, only.column)) == (str(number), places[number])
        assert only.size == (200, 200)
        assert only.agreeing == only.patches > 0


def test_a_test_picture_inside_a_training_picture_is_found(photographs):
    training = trained(other=photographs[1], whole=photographs[0])
    (found,) = training.find(photographs[0][37:187, 111:261])
    assert (found.name, found.row, found.column, found.size) == ("whole", -37, -111, (150, 150))
    assert found.agreeing == found.patches > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_overlap_of_the_sure_size_is_found_at_every_offset(dtype):
    training_picture = noise(200, 210, dtype=dtype)
    training = trained(a=training_picture)
    # every offset against the cells, and the last row
    for row in [*range(CELL), 200 - SURE]:
        column = (row * 7) % (210 - SURE)
        part = training_picture[row : row + SURE, column : column + SURE]
        test_picture = noise(SURE + 30, SURE + 20, seed=1, dtype=dtype)
        test_picture[30:, 20:] = part
        (alone,) = training.find(part)
        assert (alone.row, alone.column, alone.size) == (-row, -column, (SURE, SURE))
        hits = training._hits(overlap._window_hashes(test_picture))[0]
        assert len(hits) == alone.agreeing >= 1


def test_the_sure_size_is_the_least_that_is_sure():
    # the patch with most detail is the last of its cell, and the overlap begins one pixel late
    picture = np.zeros((200, 200, 3), np.uint8)
    last = 2 * CELL
    picture[last : last + PATCH - 1, last : last + PATCH - 1] = noise(PATCH - 1, PATCH - 1)
    training = trained(a=picture)
    assert training.find(picture[1 : 1 + SURE, 1 : 1 + SURE])
    assert not training.find(picture[1:SURE, 1:SURE])


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_overlaps_at_each_corner_are_found(corner):
    scene = noise(400, 400)
    first, second = scene[:250, :250], scene[150:, 150:]
    if corner[0] != corner[1]:
        first, second = scene[:250, 150:], scene[150:, :250]
    if corner[0]:
        first, second = second, first
    (found,) = trained(first=first).find(second)
    assert found.size == (100, 100)
    row, column = max(found.row, 0), max(found.column, 0)
    top, left = max(-found.row, 0), max(-found.column, 0)
    assert np.array_equal(
        second[row : row + 100, column : column + 100], first[top : top + 100, left : left + 100]
    )


def test_the_part_that_both_have_is_measured():
    scene = noise(300, 400)
    (found,) = trained(a=scene[:200, :250]).find(scene[60:, 30:])
    count = found.patches
    assert found == Overlap("a", -60, -30, (140, 220), count, count)
    assert count >= (140 // CELL - 1) * (220 // CELL - 1)


def test_all_training_pictures_that_overlap_are_named():
    scene = noise(300, 300)
    training = trained(
        a=scene[:200], none=noise(200, 200, seed=1), b=scene[100:], twice=scene[:200]
    )
    found = training.find(scene)
    assert [(each.name, each.row) for each in found] == [("a", 0), ("b", 100), ("twice", 0)]


def test_flat_and_striped_parts_match_nothing():
    white = np.full((200, 200, 3), 255, np.uint8)
    lines = np.ascontiguousarray(np.broadcast_to(noise(200, 1), (200, 200, 3)))
    for picture in (white, lines, lines.transpose(1, 0, 2)):
        assert len(patches_of(picture).hashes) == 0
        assert trained(a=picture).find(picture) == []


def test_a_common_logo_does_not_make_pictures_overlap():
    logo = noise(100, 100, seed=9)
    pictures = [noise(300, 300, seed=seed) for seed in (1, 2)]
    for picture in pictures:
        picture[:100, :100] = logo
    training = trained(a=pictures[0])
    assert training.find(pictures[1]) == []
    assert len(training.find(pictures[0])) == 1


def test_a_picture_that_was_partly_painted_over_is_found():
    scene = noise(300, 300)
    painted = scene.copy()
    painted[:100] = 0
    (found,) = trained(a=scene).find(painted)
    assert found.patches / 2 < found.agreeing < found.patches


def test_a_texture_that_repeats_costs_no_flood_of_candidates(monkeypatch):
    tile = noise(20, 20)
    repeated = np.tile(tile, (20, 20, 1))
    seen = []
    whole = TrainingPatches._overlap
    monkeypatch.setattr(
        TrainingPatches, "_overlap", lambda *each: seen.append(each) or whole(*each)
    )
    assert trained(a=repeated).find(repeated) == []
    assert seen == []


def test_a_changed_pixel_is_a_changed_patch():
    picture = noise(PATCH, PATCH)
    training = trained(a=picture)
    assert len(training.find(picture)) == 1
    for row, column, colour in product((0, 7, PATCH - 1), (0, 8, PATCH - 1), range(3)):
        changed = picture.copy()
        changed[row, column, colour] ^= 1
        assert training.find(changed) == []


def test_window_hashes_are_the_polynomial():
    picture = noise(PATCH + 3, PATCH + 2)
    values = overlap._mixed(picture)
    found = overlap._window_hashes(picture)
    assert found.shape == (4, 3)
    for top, left in product(range(4), range(3)):
        total = sum(
            int(values[top + row, left + column])
            * pow(overlap.DOWN, PATCH - 1 - row, 2**64)
            * pow(overlap.ACROSS, PATCH - 1 - column, 2**64)
            for row, column in product(range(PATCH), repeat=2)
        )
        assert int(found[top, left]) == total % 2**64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_patches_are_hashed_as_windows_are(dtype):
    picture = noise(100, 120, dtype=dtype)
    patches = patches_of(picture)
    windows = overlap._window_hashes(picture)
    assert np.array_equal(patches.hashes, windows[patches.rows, patches.columns])
    cells = {
        (row // CELL, column // CELL)
        for row, column in zip(patches.rows, patches.columns, strict=True)
    }
    assert cells == set(product(range(3), range(3)))  # 85 x 105 places
    assert len(cells) == len(patches.hashes)


def test_different_depths_are_different_pixels():
    picture = noise(100, 100)
    assert trained(a=picture).find(picture.astype(np.uint16)) == []


def test_colours_swapped_are_different_pixels():
    picture = noise(100, 100)
    assert trained(a=picture).find(picture[..., ::-1]) == []


def test_pictures_smaller_than_a_patch_have_none():
    for size in [(1, 1), (PATCH - 1, 200), (200, PATCH - 1)]:
        assert len(patches_of(noise(*size)).hashes) == 0
        assert trained(a=noise(200, 200)).find(noise(*size)) == []
    assert TrainingPatches([]).find(noise(200, 200)) == []


def test_a_sub_image_leaves_less_than_4_kilobytes():
    training = trained(a=noise(480, 480))
    arrays = [each for each in vars(training).values() if isinstance(each, np.ndarray)]
    assert 0 < sum(each.nbytes for each in arrays) < 4096


def test_patches_travel_between_processes():
    picture = noise(200, 200)
    patches = pickle.loads(pickle.dumps(patches_of(picture)))
    assert len(TrainingPatches([("a", patches)]).find(picture)) == 1


@pytest.mark.parametrize("shape", [(40, 40), (40, 40, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"picture.shape="):
        patches_of(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"picture.dtype=dtype\('float32'\)"):
        trained(a=noise(40, 40)).find(np.zeros((40, 40, 3), np.float32))


def test_digest_is_of_shape_type_and_pixels():
    picture = noise(20, 30)
    digest = pixel_digest(picture)
    assert digest == sha256(b"(20, 30, 3) uint8 " + picture.tobytes()).hexdigest()
    assert digest == pixel_digest(np.asfortranarray(picture))
    assert digest == pixel_digest(picture[:, ::-1][:, ::-1])
    changed = picture.copy()
    changed[-1, -1, -1] ^= 1
    others = [changed, picture.reshape(30, 20, 3), picture.astype(np.uint16)]
    assert len({digest, *map(pixel_digest, others)}) == 4
