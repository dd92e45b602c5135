"""Arrays and tensors enlarged: what stays, what tiles change, what happens without memory."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_ARGUMENTS, small_checkpoint
from PIL import Image
from scipy import ndimage

import dlgsanet_arch
from dlgsanet_arch import memory
from dlgsanet_arch.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference import Upscaler, upscale
from dlgsanet_arch.memory import UpscaleError
from dlgsanet_arch.network import DLGSANet


def checkpoint(**changes):
    """Small weights that make an enlarged image: nearest neighbours and a little of a network."""
    torch.manual_seed(1)
    made = small_checkpoint(**changes)
    weights, colours, times = made.weights, made.config["in_chans"], made.scale**2
    embed, last = weights["overlap_embed.0.proj.weight"], weights["upsample.0.weight"]
    body = max(name for name in weights if name.startswith("deep") and name.endswith(".weight"))
    weights[body][:colours] *= 0.1
    weights[body.replace("weight", "bias")][:colours] = 0
    embed[:colours] = 0
    last *= 0.1
    last[:, :colours] = 0
    weights["upsample.0.bias"].zero_()
    for channel in range(colours):
        embed[channel, channel, 1, 1] = 1
        last[channel * times : (channel + 1) * times, channel, 1, 1] = 1
    return made


@pytest.fixture(scope="module")
def small():
    return checkpoint()


@pytest.fixture(scope="module")
def local():
    """A network that sees 6 pixels around: MHDLSA, GDFN and four convolutions, 3x3 each."""
    return checkpoint(buildblock_type="idynamic")


@pytest.fixture
def ours(small):
    return Upscaler(small, device="cpu")


def image(height, width, channels=3, dtype=np.uint8, seed=0):
    """A smooth image with some noise, of all levels."""
    rng = np.random.default_rng(seed)
    shape = (height, width, channels) if channels else (height, width)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [3, 3, 0][: len(shape)])
    smooth = smooth / max(1e-9, np.abs(smooth).max()) + 0.05 * rng.normal(size=shape)
    white = np.iinfo(dtype).max
    return ((smooth * 0.4 + 0.5) * white).clip(0, white).round().astype(dtype)


def direct(weights, array):
    """What the network makes of (H, W, 3) with values in [0, 1], in float."""
    given = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return weights.network()(given)[0].permute(1, 2, 0).clamp(0, 1).numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (23, 17)])
def test_colour_is_the_networks_own(ours, small, dtype, size):
    array, white = image(*size, dtype=dtype), np.iinfo(dtype).max
    made = ours(array)
    assert made.dtype == dtype
    expected = np.round(direct(small, array / white) * white)
    assert np.abs(made - expected).max() <= (0 if dtype == np.uint8 else 1)
    assert np.array_equal(ours(array.astype(array.dtype.newbyteorder(">"))), made)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_is_the_luma_of_what_becomes_of_three_equal_channels(ours, small, dtype):
    array, white = image(20, 26, 0, dtype), np.iinfo(dtype).max
    made = ours(array)
    assert (made.shape, made.dtype) == ((40, 52), dtype)
    colour = direct(small, np.dstack([array] * 3) / white)
    expected = colour @ np.array([0.299, 0.587, 0.114]) * white
    # Clipped after and before: only near black and white they differ.
    inside = (colour > 0.01).all(2) & (colour < 0.99).all(2)
    assert inside.mean() > 0.9
    assert np.abs(made - expected)[inside].max() <= (0.51 if dtype == np.uint8 else 2)
    assert np.array_equal(ours(array[..., None])[..., 0], made)


def test_networks_for_other_channels():
    upscaler, array = Upscaler(checkpoint(in_chans=1), device="cpu"), image(15, 19)
    made = upscaler(array)
    for channel in range(3):
        assert np.array_equal(made[..., channel], upscaler(array[..., channel]))
    with pytest.raises(UpscaleError, match="take 4 channels"):
        Upscaler(small_checkpoint(in_chans=4), device="cpu")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3)), "got float64"),
        (np.zeros((4, 4, 5), np.uint8), r"got the shape \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got the shape \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"got the shape \(4,\)"),
        ([[1, 2]], "got list"),
        (Image.new("F", (3, 4)), "got float32"),
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4), r"\(1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 4, 4), 255.0), r"in \[0, 1\]; got 255 to 255: divide by 255"),
        (torch.tensor([-1.0, 1]).expand(1, 3, 4, 2), "got -1 to 1: scale it"),
        (torch.full((1, 3, 4, 4), torch.nan), "got nan to nan: replace values that are not finite"),
        (torch.zeros(1, 3, 4, 4, device="meta"), "torch.float32, meta"),
        (torch.zeros(1, 3, 4, 4).to_sparse(), "torch.float32, sparse_coo"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_what_is_not_an_image_is_refused(ours, array, said):
    with pytest.raises(ValueError, match=said):
        ours(array)


def test_files_and_pillow_images_are_taken(ours, small, tmp_path):
    file = tmp_path / "a.png"
    assert ours(Image.new("La", (9, 7))).mode == "LA"
    with pytest.raises(UserError, match="cannot be opened: embedded null byte"):
        ours("a\0b")
    for mode, channels in (("L", 0), ("LA", 2), ("RGB", 3), ("RGBA", 4)):
        array = image(7, 9, channels)
        given = Image.fromarray(array)
        given.save(file)
        given.info["icc_profile"] = b"profile"
        made = ours(given)
        assert (made.mode, made.size, made.info["icc_profile"]) == (mode, (18, 14), b"profile")
        for each in (np.asarray(made), upscale(file, small, device="cpu"), ours(str(file))):
            assert np.array_equal(each, ours(array))
    turned = Image.fromarray(image(7, 9))
    turned.getexif()[0x0112] = 6
    assert np.array_equal(np.asarray(ours(turned)), ours(np.rot90(image(7, 9), -1)))
    assert ours(Image.fromarray(image(7, 9)).quantize(8)).mode == "RGB"
    assert ours(Image.new("CMYK", (3, 4))).mode == "RGB"
    with pytest.raises(UserError, match=r"none\.png cannot be opened"):
        ours(tmp_path / "none.png")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_keep_dtype_and_place(small, dtype):
    given, counted = torch.rand(5, 3, 14, 9).to(dtype), []
    upscaler = Upscaler(small, device="cpu", batch=2)
    made = upscaler(given, lambda *done: counted.append(done))
    assert (made.dtype, made.device, made.requires_grad) == (dtype, given.device, False)
    with torch.no_grad():
        expected = small.network()(given.float()).clamp(0, 1).to(dtype)
    assert (made - expected).abs().max() <= (1e-6 if dtype != torch.bfloat16 else 0)
    assert upscaler(given[:, :1]).shape == (5, 1, 28, 18)
    assert counted == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.gpu
def test_tensors_stay_on_their_gpu(small):
    given = torch.rand(2, 3, 30, 40, device="cuda")
    made = Upscaler(small, tile=24)(given)
    assert made.device == given.device
    for dtype in ("bf16", "fp16"):
        other = Upscaler(small, tile=24, dtype=dtype)(given)
        assert (other - made).abs().max() < 0.02
    array = image(30, 40)
    cpu, gpu = (Upscaler(small, device=name)(array).astype(int) for name in ("cpu", "cuda"))
    assert np.abs(cpu - gpu).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [("fp32", 2e-3), ("bf16", 2e-2)])
def test_replayed_tiles_are_those_of_the_network_on_cuda(small, dtype, atol, recwarn):
    replayed, plain = (Upscaler(small, tile=24, batch=2, dtype=dtype) for _ in range(2))
    plain._graphs = lambda network, x: network(x)
    network, kept = replayed.network, replayed._graphs._kept
    for size in ((60, 90), (60, 90), (40, 30), (24, 24)):  # tiles of one size, and other images
        given = torch.rand(1, 3, *size, device="cuda")
        torch.testing.assert_close(replayed(given), plain(given), rtol=0, atol=atol)
    assert any(kept.values())
    with torch.no_grad():
        for parameters in zip(network.parameters(), plain.network.parameters(), strict=True):
            for each in parameters:
                each.mul_(0.9)
    before = len(kept)
    torch.testing.assert_close(replayed(given), plain(given), rtol=0, atol=atol)
    network.upsample[0].weight = torch.nn.Parameter(network.upsample[0].weight.detach().clone())
    torch.testing.assert_close(replayed(given), plain(given), rtol=0, atol=atol)
    assert len(kept) == before + 1
    assert not [each for each in recwarn.list if "CUDA graphs" in str(each.message)]


@pytest.mark.gpu
def test_the_memory_of_recordings_is_freed_on_cuda(small):
    upscaler, given = Upscaler(small, tile=0), torch.rand(1, 3, 400, 400, device="cuda")
    reserved = []
    for _ in range(3):
        for _ in range(3):
            upscaler(given)
        assert all(upscaler._graphs._kept.values())
        for clear in (lambda: None, upscaler._graphs.clear):
            clear()
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] > reserved[1]
    assert reserved[1] >= reserved[3] >= reserved[5]  # libraries keep some from their first call


# Transparency


def with_alpha(height, width, dtype, channels=3):
    """A light disc with a soft rim on black that nobody is to see."""
    white = np.iinfo(dtype).max
    y, x = np.mgrid[:height, :width]
    alpha = np.clip(height / 3 - np.hypot(y - height / 2, x - width / 2), 0, 1)
    colour = np.zeros((height, width, channels))
    colour[alpha > 0] = 0.9
    whole = np.concatenate([colour, alpha[..., None]], 2) * white
    return whole.round().astype(dtype)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_rim_of_what_is_seen_is_not_dark(ours, dtype, channels):
    array, white = with_alpha(40, 44, dtype, channels), np.iinfo(dtype).max
    made = ours(array)
    assert (made.shape, made.dtype) == ((80, 88, channels + 1), dtype)
    colour, alpha = made[..., :-1] / white, made[..., -1] / white
    even = ours(np.full((40, 44, channels), round(0.9 * white), dtype)) / white
    assert np.abs(colour - even)[alpha > 0.02].max() < 0.02
    # The transparency of a disc stays one: its area is four times that before.
    assert alpha.sum() == pytest.approx(4 * array[..., -1].sum() / white, rel=0.03)
    # Black that is not to be seen makes a dark rim where it is not replaced.
    naive = ours(np.ascontiguousarray(array[..., :-1]))
    assert np.abs(naive / white - even)[alpha > 0.02].max() > 0.1


@pytest.mark.parametrize("scale", [2, 1.5])
def test_opaque_stays_opaque_and_clear_stays_clear(scale):
    weights = checkpoint()
    weights.weights["upsample.0.bias"].sub_(0.02)  # makes everything darker
    upscaler = Upscaler(weights, device="cpu", scale=scale)
    array = np.full((30, 40, 4), 128, np.uint8)
    array[..., 3] = np.where(np.arange(40) < 20, 255, 0)
    made = upscaler(array)[..., 3]
    away, half = round(1.5 * scale), round(20 * scale)
    assert (made[:, : half - away] == 255).all()
    assert (made[:, half + away :] == 0).all()
    array[..., 3] = 77
    assert (upscaler(array)[..., 3] == 77).all()


# Tiles


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("tile", "overlap"), [(48, 24), (53, 26)])
def test_tiles_of_a_local_network_give_the_whole_image(local, tile, overlap, batch):
    array = image(70, 90, dtype=np.uint16)
    whole = Upscaler(local, device="cpu", tile=0)(array).astype(int)
    made = Upscaler(local, device="cpu", tile=tile, overlap=overlap, batch=batch)(array)
    # Kernels sum in an order that depends on the width.
    assert np.abs(made - whole).max() <= 1
    # Less than four times what the network sees around a pixel is not enough.
    less = Upscaler(local, device="cpu", tile=tile, overlap=4)(array)
    assert np.abs(less - whole).max() > 20


def test_how_far_tiles_are_off_is_measured(local):
    array, whole = image(70, 90), Upscaler(local, device="cpu", tile=0)
    assert Upscaler(local, device="cpu", tile=48, overlap=32).tiling_error(array)[0] < 1e-3
    coarse = Upscaler(local, device="cpu", tile=16, overlap=0)
    largest, mean = coarse.tiling_error(array)
    assert largest > max(0.01, mean)
    assert whole.tiling_error(array) is None
    assert abs(np.abs(coarse(array).astype(float) - whole(array)).max() - largest) <= 1


def test_tiles_are_counted_and_nothing_is_printed(small, capfd):
    counted = []
    tiled = Upscaler(small, device="cpu", tile=32, overlap=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiled(image(40, 60, 4), lambda *done: counted.append(done))
    total = counted[0][1]
    assert counted == [(done, total) for done in range(1, total + 1)]
    assert capfd.readouterr() == ("", "")


def test_the_ensemble_turns_with_the_image(ours, small):
    array, upscaler = image(18, 25, dtype=np.uint16), Upscaler(small, device="cpu", ensemble=True)
    for each, (least, most) in ((upscaler, (0, 1)), (ours, (20, 1 << 16))):
        apart = np.abs(np.rot90(each(array)).astype(int) - each(np.rot90(array)))
        assert least <= apart.max() <= most


def test_tiles_fit_the_free_memory(ours, small, monkeypatch):
    needed = memory.bytes_a_pixel(small.config, ours.device)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * needed * 512**2)
    assert ours.choose_tile(512, 512) == ours.choose_tile(400, 600) == 0
    tile = ours.choose_tile(512, 1024)
    assert 440 < tile <= 520
    assert ours.choose_tile(512, 1024, batch=4) == pytest.approx(tile / 2, abs=8)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    # One window of TLC and what is shared is kept together, however little there is.
    assert ours.choose_tile(512, 512) >= SMALL_ARGUMENTS["tlc_kernel"] + 2 * ours.overlap
    assert Upscaler(small, device="cpu", tile=0).choose_tile(9999, 9999) == 0
    assert Upscaler(small, device="cpu", tile=64).choose_tile(64, 20) == 0
    with pytest.raises(UpscaleError, match="the result needs"):
        ours(image(60, 60))


def test_the_memory_of_machine_and_container(tmp_path, monkeypatch):
    free = memory.free_memory(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 50
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 1 << 20
    # A container's limit counts, and cached files make room.
    (tmp_path / "memory.max").write_text("900000\n")
    (tmp_path / "memory.current").write_text("800000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 300000\n")
    assert memory.free_memory(torch.device("cpu")) == 400_000


class Scarce:
    """A network in place of Upscaler's, which runs out of memory above a number of pixels."""

    def __init__(self, upscaler, most, error):
        self.net, self.most, self.error, self.sizes = upscaler.network, most, error, []
        upscaler.network = self

    def __call__(self, given):
        self.sizes.append(tuple(given.shape[2:]))
        if given.shape[0] * given.shape[2] * given.shape[3] > self.most:
            raise self.error
        return self.net(given)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:12],
)
def test_out_of_memory_means_smaller_tiles(local, error):
    array = image(70, 90)
    expected = Upscaler(local, device="cpu", tile=22, overlap=24)(array)
    upscaler = Upscaler(local, device="cpu", tile=0, overlap=24)
    scarce = Scarce(upscaler, 30 * 30, error)
    with pytest.warns(RuntimeWarning) as said:
        assert np.array_equal(upscaler(array), expected)
    assert [str(each.message) for each in said] == [
        "out of memory on cpu with the whole image; again with tiles of 45",
        "out of memory on cpu with tiles of 45; again with tiles of 22",
    ]
    scarce.sizes.clear()
    upscaler(array)  # does not try again what failed, and says nothing
    assert max(scarce.sizes) <= (22, 22)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("none"), "not suffice even for tiles of 16"),
        (RuntimeError("an illegal memory access"), "illegal memory access"),
    ],
)
def test_memory_that_never_suffices_and_other_errors(small, error, said):
    upscaler = Upscaler(small, device="cpu", notice=lambda text: None)
    Scarce(upscaler, 0, error)
    with pytest.raises((UpscaleError, RuntimeError), match=said):
        upscaler(image(40, 40))


# Precision, scale, weights, devices


def test_half_precision_is_near_and_said_to_be_slow_on_a_cpu(ours, small):
    array, said = image(30, 40), []
    made = Upscaler(small, device="cpu", dtype="bf16", notice=said.append)(array)
    assert np.abs(made.astype(int) - ours(array)).max() <= 4
    assert said == ["bf16 is slower than fp32 on a CPU and needs more memory"]


def test_a_device_that_cannot_is_named(small, monkeypatch):
    def refuse(self, x):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(DLGSANet, "forward", refuse)
    with pytest.raises(UpscaleError, match=r"cpu cannot compute .* in fp16 .*'Half'.*fp32"):
        Upscaler(small, device="cpu", dtype="fp16")


@pytest.mark.parametrize(
    ("value", "said"), [(torch.nan, "the weights are damaged"), (1e38, "its weights are too large")]
)
def test_results_that_are_not_numbers_are_never_an_image(small, value, said):
    name = "overlap_embed.0.proj.weight"
    weights = {**small.weights, name: torch.full_like(small.weights[name], value)}
    broken = Upscaler(Checkpoint(weights, small.config), device="cpu")
    with pytest.raises(UpscaleError, match=f"not numbers in fp32: {said}"):
        broken(image(9, 9))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("scale", [1, 1.5, 3, 0.5])
def test_another_scale_is_resized_at_the_end(small, scale, dtype):
    array, white = image(20, 31, dtype=dtype), np.iinfo(dtype).max
    upscaler = Upscaler(small, device="cpu", scale=scale)
    made = upscaler(array)
    assert (made.shape, made.dtype) == ((round(20 * scale), round(31 * scale), 3), dtype)
    whole = torch.from_numpy(direct(small, array / white)).permute(2, 0, 1)[None]
    expected = F.interpolate(whole, made.shape[:2], mode="bicubic", antialias=True).clamp(0, 1)
    expected = expected[0].permute(1, 2, 0).numpy() * white
    assert np.abs(made - expected).max() < (0.52 if dtype == np.uint8 else 3)
    tensor = torch.from_numpy(array.astype(np.float32) / white).permute(2, 0, 1)[None]
    resized = upscaler(tensor)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized * white - expected).max() < (0.01 if dtype == np.uint8 else 1)


def test_weights_are_needed(monkeypatch, tmp_path, small):
    array = image(8, 8)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(UpscaleError, match=r"weights are needed.*-m net_g_latest.pth"):
        upscale(array)
    (tmp_path / "weights").mkdir()
    for scale in (2, 4):
        path = tmp_path / "weights" / f"tiny_x{scale}.safetensors"
        save_checkpoint(checkpoint(upscale=scale), path)
    assert upscale(array, device="cpu").shape == (32, 32, 3)
    assert np.array_equal(upscale(array, device="cpu", scale=2), upscale(array, small))
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be read"):
        Upscaler(tmp_path / "none.pth")


WRONG = {
    "tile": (3, -1, "big"),
    "overlap": (-1, float("nan")),
    "batch": (0, "2"),
    "scale": (0, 100, "2"),
}
WRONG |= {"dtype": ("fp8", ("fp32",)), "device": ("cuda:99", "nonsense")}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_arguments_out_of_range_are_named(small, name, value):
    with pytest.raises(UpscaleError, match=f"{name}.*{re.escape(str(value))}"):
        Upscaler(small, **{"device": "cpu", name: value})


def test_images_together_are_the_images_one_by_one(small):
    images = [image(12, 17, 4, seed=seed) for seed in range(3)]
    upscaler = Upscaler(small, device="cpu", batch=3)
    for together, alone in zip(upscaler.many(images), map(upscaler, images), strict=True):
        assert np.abs(together.astype(int) - alone).max() <= 1
    with pytest.raises(ValueError, match="one shape and dtype"):
        upscaler.many([images[0], images[1][:5]])


def test_the_package_offers_it():
    assert (dlgsanet_arch.Upscaler, dlgsanet_arch.upscale) == (Upscaler, upscale)
    assert dlgsanet_arch.__all__ == sorted(dlgsanet_arch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dlgsanet_arch.nonsense


# Memory for real

PEAK = """
import resource, sys
import numpy as np, torch
from dlgsanet_arch.inference import Upscaler
torch.set_num_threads(1)
height, width, weights = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ours = Upscaler(weights, device="cpu", tile=256)
array = np.zeros((height, width, 3), np.uint8)
array[:] = np.arange(width, dtype=np.uint8)[:, None]
ours(array[:600, :600])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = ours(array)
assert made.shape == (2 * height, 2 * width, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss differs elsewhere")
@pytest.mark.parametrize(
    "size", [(6000, 400), pytest.param((5000, 8000), marks=pytest.mark.faults)], ids=str
)
def test_large_images_take_little_more_than_their_result(tmp_path, small, size):
    save_checkpoint(small, tmp_path / "small.pth")
    command = [sys.executable, "-c", PEAK, *map(str, size), str(tmp_path / "small.pth")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    height, width = size
    pixels = 4 * height * width
    # The image and its result in 8 bits, and three rows of tiles in float32.
    bound = 3 * pixels + 3 * height * width + 3 * 4 * 3 * (2 * 256 * 2 * width)
    assert int(done.stdout) < bound + (32 << 20)
    assert int(done.stdout) < 12 * pixels  # the whole result in float32
