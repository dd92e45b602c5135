"""Arrays and tensors enlarged: what stays, what tiles change, what happens without memory."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_NETWORK, run
from PIL import Image
from scipy import ndimage

import dlgsanet_arch
from dlgsanet_arch import memory
from dlgsanet_arch.checkpoint import Checkpoint, CheckpointError, infer_config, save_checkpoint
from dlgsanet_arch.errors import UserError
from dlgsanet_arch.inference import Upscaler, arrays, upscale
from dlgsanet_arch.memory import UpscaleError
from dlgsanet_arch.network import DLGSANet

SMALL = {name: value for name, value in SMALL_NETWORK.items() if name != "type"}


def checkpoint(**changes):
    """Small weights that make an enlarged image: nearest neighbours and a little of a network."""
    torch.manual_seed(1)
    config = {**SMALL, **changes}
    net = DLGSANet(**config)
    colours = net.in_chans
    with torch.no_grad():
        embed, last = net.overlap_embed[0].proj, net.upsample[0]
        net.deep_feature_extraction[-1].weight[:colours] *= 0.1
        net.deep_feature_extraction[-1].bias[:colours] = 0
        embed.weight[:colours] = 0
        last.weight *= 0.1
        last.weight[:, :colours] = 0
        last.bias.zero_()
        for channel in range(colours):
            embed.weight[channel, channel, 1, 1] = 1
            last.weight[
                channel * config["upscale"] ** 2 : (channel + 1) * config["upscale"] ** 2,
                channel,
                1,
                1,
            ] = 1
    weights = net.state_dict()
    return Checkpoint(weights, {**infer_config(weights), **config}, True)


@pytest.fixture(scope="module")
def small():
    return checkpoint()


@pytest.fixture(scope="module")
def local():
    """A network that sees 6 pixels around: MHDLSA, GDFN and four convolutions, 3x3 each."""
    return checkpoint(buildblock_type="idynamic")


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
def test_colour_is_the_networks_own(small, dtype, size):
    array, white = image(*size, dtype=dtype), np.iinfo(dtype).max
    made = Upscaler(small, device="cpu")(array)
    assert made.dtype == dtype
    expected = np.round(direct(small, array / white) * white)
    assert np.abs(made - expected).max() <= (0 if dtype == np.uint8 else 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_is_the_luma_of_what_becomes_of_three_equal_channels(small, dtype):
    array, white = image(20, 26, 0, dtype), np.iinfo(dtype).max
    made = Upscaler(small, device="cpu")(array)
    assert made.shape == (40, 52)
    assert made.dtype == dtype
    colour = direct(small, np.dstack([array] * 3) / white)
    expected = colour @ np.array([0.299, 0.587, 0.114]) * white
    # Clipped after and before: only near black and white they differ.
    inside = (colour > 0.01).all(2) & (colour < 0.99).all(2)
    assert inside.mean() > 0.9
    assert np.abs(made - expected)[inside].max() <= 0.51 if dtype == np.uint8 else 2
    with_axis = Upscaler(small, device="cpu")(array[..., None])
    assert np.array_equal(with_axis[..., 0], made)


def test_a_network_for_gray_enlarges_colour_channel_by_channel():
    upscaler = Upscaler(checkpoint(in_chans=1), device="cpu")
    array = image(15, 19)
    made = upscaler(array)
    for channel in range(3):
        assert np.array_equal(made[..., channel], upscaler(array[..., channel]))


def test_other_channels_are_refused():
    with pytest.raises(UpscaleError, match="take 4 channels"):
        Upscaler(checkpoint(in_chans=4), device="cpu")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4), r"\(1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 4, 4), 255.0), r"in \[0, 1\]; got 255 to 255: divide by 255"),
        (torch.tensor([-1.0, 1]).expand(1, 3, 4, 2), "got -1 to 1: scale it"),
        (torch.full((1, 3, 4, 4), torch.nan), "got nan to nan"),
        ([[1, 2]], "got list"),
        (Image.new("F", (3, 4)), "mode F"),
    ],
)
def test_what_is_no_image_is_refused(small, array, said):
    with pytest.raises(ValueError, match=said):
        Upscaler(small, device="cpu")(array)


def test_files_and_pillow_images_are_taken(small, tmp_path):
    ours = Upscaler(small, device="cpu")
    for mode, channels in (("L", 0), ("LA", 2), ("RGB", 3), ("RGBA", 4)):
        array = image(7, 9, channels)
        given = Image.fromarray(array)
        given.save(tmp_path / "a.png")
        given.info["icc_profile"] = b"profile"
        made = ours(given)
        assert (made.mode, made.size, made.info["icc_profile"]) == (mode, (18, 14), b"profile")
        assert np.array_equal(np.asarray(made), ours(array))
        assert np.array_equal(upscale(tmp_path / "a.png", small, device="cpu"), ours(array))
        assert np.array_equal(ours(str(tmp_path / "a.png")), ours(array))
    turned = Image.fromarray(image(7, 9))
    turned.getexif()[0x0112] = 6
    assert np.array_equal(np.asarray(ours(turned)), ours(np.rot90(image(7, 9), -1)))
    assert ours(Image.fromarray(image(7, 9)).quantize(8)).mode == "RGB"
    assert ours(Image.new("CMYK", (3, 4))).mode == "RGB"
    with pytest.raises(UserError, match=r"none\.png cannot be opened"):
        ours(tmp_path / "none.png")


def test_bytes_may_be_in_the_other_order(small):
    array = image(7, 9, dtype=np.uint16)
    made = Upscaler(small, device="cpu")(array.astype(">u2"))
    assert np.array_equal(made, Upscaler(small, device="cpu")(array))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_keep_dtype_and_place(small, dtype):
    given = torch.rand(3, 3, 14, 9).to(dtype)
    made = Upscaler(small, device="cpu", batch=2)(given)
    assert made.dtype == dtype
    assert made.device == given.device
    assert not made.requires_grad
    with torch.no_grad():
        expected = small.network()(given.float()).clamp(0, 1).to(dtype)
    assert (made - expected).abs().max() <= (1e-6 if dtype != torch.bfloat16 else 0)
    gray = Upscaler(small, device="cpu")(given[:, :1])
    assert gray.shape == (3, 1, 28, 18)


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
def test_the_rim_of_what_is_seen_is_not_dark(small, dtype, channels):
    array, white = with_alpha(40, 44, dtype, channels), np.iinfo(dtype).max
    made = Upscaler(small, device="cpu")(array)
    assert made.shape == (80, 88, channels + 1)
    assert made.dtype == dtype
    colour, alpha = made[..., :-1] / white, made[..., -1] / white
    flat = np.full((40, 44, channels), round(0.9 * white), dtype)
    even = Upscaler(small, device="cpu")(flat if channels == 3 else flat[..., 0]) / white
    even = even.reshape(80, 88, channels)
    assert np.abs(colour - even)[alpha > 0.02].max() < 0.02
    # The transparency of a disc stays one: its area is four times that before.
    assert alpha.sum() == pytest.approx(4 * array[..., -1].sum() / white, rel=0.03)
    # Black that is not to be seen makes a dark rim where it is not replaced.
    naive = Upscaler(small, device="cpu")(np.ascontiguousarray(array[..., :-1]))
    assert np.abs(naive / white - even)[alpha > 0.02].max() > 0.1


@pytest.mark.parametrize("scale", [2, 1.5])
def test_opaque_stays_opaque_and_clear_stays_clear(scale):
    weights = checkpoint()
    weights.weights["upsample.0.bias"].sub_(0.02)  # makes everything darker
    array = np.full((30, 40, 4), 128, np.uint8)
    array[..., 3] = np.where(np.arange(40) < 20, 255, 0)
    made = Upscaler(weights, device="cpu", scale=scale)(array)[..., 3]
    away = round(1.5 * scale)
    half = round(20 * scale)
    assert (made[:, : half - away] == 255).all()
    assert (made[:, half + away :] == 0).all()
    middle = array.copy()
    middle[..., 3] = 77
    assert (Upscaler(weights, device="cpu", scale=scale)(middle)[..., 3] == 77).all()


def test_only_what_nobody_sees_is_filled():
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (21, 30, 3), np.uint8), np.zeros((21, 30, 1), np.uint8)
    alpha[5:9, 7:12] = rng.integers(1, 256, (4, 5, 1))
    filled = arrays.fill_transparent(colour, alpha)
    seen = alpha[..., 0] > 0
    assert np.array_equal(filled[seen], colour[seen])
    assert filled.min() >= colour[seen].min()
    assert filled.max() <= colour[seen].max()
    for other in (np.zeros_like(alpha), np.full_like(alpha, 3)):
        assert np.array_equal(arrays.fill_transparent(colour, other), colour)


# Tiles


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("tile", "overlap"), [(48, 24), (53, 26), (64, 32)])
def test_tiles_of_a_local_network_give_the_whole_image(local, tile, overlap, batch):
    array = image(70, 90, dtype=np.uint16)
    whole = Upscaler(local, device="cpu", tile=0)(array).astype(int)
    made = Upscaler(local, device="cpu", tile=tile, overlap=overlap, batch=batch)(array)
    # Kernels sum in an order that depends on the width.
    assert np.abs(made - whole).max() <= 1
    # Less than four times what the network sees around a pixel is not enough.
    less = Upscaler(local, device="cpu", tile=tile, overlap=4)(array)
    assert np.abs(less - whole).max() > 20


def test_tiles_are_seen_to_differ_where_they_do(small, local):
    array = image(70, 90)
    error = Upscaler(local, device="cpu", tile=48, overlap=32).tiling_error(array)
    assert error[0] < 1e-3
    largest, mean = Upscaler(local, device="cpu", tile=16, overlap=0).tiling_error(array)
    assert largest > 0.01
    assert largest > mean > 0
    whole = Upscaler(local, device="cpu", tile=0)
    assert whole.tiling_error(array) is None
    made = Upscaler(local, device="cpu", tile=16, overlap=0)(array).astype(float)
    assert abs(np.abs(made - whole(array)).max() - largest) <= 1
    assert Upscaler(small, device="cpu", tile=32).tiling_error(image(70, 90, 2)) is not None


@pytest.mark.parametrize("tlc", [True, False])
def test_attention_of_tiles_is_near_that_of_the_image(tlc):
    weights = checkpoint(tlc_flag=tlc, tlc_kernel=24)
    largest, mean = Upscaler(weights, device="cpu", tile=48, overlap=24).tiling_error(image(70, 90))
    assert 0 < largest < 8
    assert mean < 1


def test_tiles_are_counted(small):
    counted = []
    Upscaler(small, device="cpu", tile=32, overlap=8)(
        image(40, 60, 4), lambda *done: counted.append(done)
    )
    total = counted[0][1]
    assert counted == [(done, total) for done in range(1, total + 1)]
    counted.clear()
    Upscaler(small, device="cpu", batch=2)(
        torch.rand(5, 3, 8, 8), lambda *done: counted.append(done)
    )
    assert counted == [(1, 3), (2, 3), (3, 3)]


def test_the_ensemble_turns_with_the_image(small):
    array = image(18, 25, dtype=np.uint16)
    upscaler = Upscaler(small, device="cpu", ensemble=True)
    made = upscaler(array).astype(int)
    turned = upscaler(np.rot90(array)).astype(int)
    assert np.abs(np.rot90(made) - turned).max() <= 1
    plain = Upscaler(small, device="cpu")
    assert np.abs(np.rot90(plain(array)).astype(int) - plain(np.rot90(array))).max() > 20


def test_tiles_fit_the_memory_there_is(small, monkeypatch):
    chooser = Upscaler(small, device="cpu")
    needed = memory.bytes_a_pixel(small.config, chooser.device)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * needed * 512**2)
    assert chooser.choose_tile(512, 512) == 0
    assert chooser.choose_tile(400, 600) == 0
    tile = chooser.choose_tile(512, 1024)
    assert 440 < tile <= 520
    assert chooser.choose_tile(512, 1024, batch=4) == pytest.approx(tile / 2, abs=8)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    # One window of TLC and what is shared is kept together, however little there is.
    assert chooser.choose_tile(512, 512) >= SMALL["tlc_kernel"] + 2 * chooser.overlap
    assert Upscaler(small, device="cpu", tile=0).choose_tile(9999, 9999) == 0
    assert Upscaler(small, device="cpu", tile=64).choose_tile(64, 20) == 0


def test_the_memory_there_is(tmp_path, monkeypatch):
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

    def __init__(self, net, most, error):
        self.net, self.most, self.error, self.sizes = net, most, error, []

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
    said, array = [], image(70, 90)
    expected = Upscaler(local, device="cpu", tile=22, overlap=24)(array)
    upscaler = Upscaler(local, device="cpu", tile=0, overlap=24, notice=said.append)
    upscaler._forward.net = Scarce(upscaler._forward.net, 30 * 30, error)
    assert np.array_equal(upscaler(array), expected)
    assert said == [
        "out of memory on cpu with the whole image; again with tiles of 45",
        "out of memory on cpu with tiles of 45; again with tiles of 22",
    ]
    # The next image does not try again what failed.
    upscaler._forward.net.sizes.clear()
    upscaler(array)
    assert len(said) == 2
    assert max(upscaler._forward.net.sizes) <= (22, 22)


def test_memory_that_never_suffices_is_an_error(small):
    upscaler_ = Upscaler(small, device="cpu", notice=lambda text: None)
    upscaler_._forward.net = Scarce(upscaler_._forward.net, 0, MemoryError("none"))
    with pytest.raises(UpscaleError, match="not suffice even for tiles of 16"):
        upscaler_(image(40, 40))


def test_other_errors_are_not_taken_for_it(small):
    broken = Upscaler(small, device="cpu")
    broken._forward.net = Scarce(broken._forward.net, 0, RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        broken(image(40, 40))


def test_a_result_that_does_not_fit_is_refused_before_it_is_computed(small, monkeypatch):
    ours = Upscaler(small, device="cpu", tile=64)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000)
    with pytest.raises(UpscaleError, match="the result needs"):
        ours(image(60, 60))


# Precision, scale, weights, devices


def test_half_precision_is_near_and_said_to_be_slow_on_a_cpu(small):
    array, said = image(30, 40), []
    made = Upscaler(small, device="cpu", dtype="bf16", notice=said.append)(array)
    assert np.abs(made.astype(int) - Upscaler(small, device="cpu")(array)).max() <= 4
    assert said == ["bf16 is slower than fp32 on a CPU and needs more memory"]


def test_a_device_that_cannot_is_named(small, monkeypatch):
    def refuse(self, x):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(DLGSANet, "forward", refuse)
    with pytest.raises(UpscaleError, match=r"cpu cannot compute .* in fp16 .*'Half'.*fp32"):
        Upscaler(small, device="cpu", dtype="fp16")


def test_results_that_are_no_numbers_are_never_a_image(small):
    weights = {name: tensor.clone() for name, tensor in small.weights.items()}
    weights["overlap_embed.0.proj.weight"][0] = torch.nan
    broken = Upscaler(Checkpoint(weights, small.config), device="cpu")
    with pytest.raises(UpscaleError, match="not numbers in fp32: the weights are damaged"):
        broken(image(9, 9))
    weights["overlap_embed.0.proj.weight"].fill_(1e38)
    broken = Upscaler(Checkpoint(weights, small.config), device="cpu")
    with pytest.raises(UpscaleError, match="not numbers in fp32: its weights are too large"):
        broken(image(9, 9))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("scale", [1, 1.5, 3, 0.5])
def test_another_scale_is_resized_at_the_end(small, scale, dtype):
    array, white = image(20, 31, dtype=dtype), np.iinfo(dtype).max
    made = Upscaler(small, device="cpu", scale=scale)(array)
    assert made.shape == (round(20 * scale), round(31 * scale), 3)
    assert made.dtype == dtype
    whole = torch.from_numpy(direct(small, array / white)).permute(2, 0, 1)[None]
    expected = F.interpolate(whole, made.shape[:2], mode="bicubic", antialias=True).clamp(0, 1)
    expected = expected[0].permute(1, 2, 0).numpy() * white
    assert np.abs(made - expected).max() < (0.52 if dtype == np.uint8 else 3)
    tensor = torch.from_numpy(array.astype(np.float32) / white).permute(2, 0, 1)[None]
    resized = Upscaler(small, device="cpu", scale=scale)(tensor)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized * white - expected).max() < (0.01 if dtype == np.uint8 else 1)


def test_weights_are_needed(monkeypatch, tmp_path, small):
    array = image(8, 8)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(UpscaleError, match=r"weights are needed.*-m net_g_latest.pth"):
        upscale(array)
    (tmp_path / "weights").mkdir()
    for scale in (2, 4):
        save_checkpoint(
            checkpoint(upscale=scale), tmp_path / "weights" / f"tiny_x{scale}.safetensors"
        )
    assert upscale(array, device="cpu").shape == (32, 32, 3)
    assert upscale(array, device="cpu", scale=2).shape == (16, 16, 3)
    assert np.array_equal(upscale(array, device="cpu", scale=2), upscale(array, small))


def test_files_of_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth cannot be read"):
        Upscaler(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "arguments",
    [
        {"tile": 3},
        {"tile": -1},
        {"tile": "big"},
        {"overlap": -1},
        {"batch": 0},
        {"scale": 0},
        {"scale": 100},
        {"dtype": "fp8"},
        {"device": "cuda:99"},
        {"device": "nonsense"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(small, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UpscaleError, match=rf"{name}.*{value}"):
        Upscaler(small, **{"device": "cpu", **arguments})


def test_images_together_are_the_images_one_by_one(small):
    images = [image(12, 17, 4, seed=seed) for seed in range(3)]
    ours = Upscaler(small, device="cpu", batch=3)
    for together, alone in zip(ours.many(images), map(ours, images), strict=True):
        assert np.abs(together.astype(int) - alone).max() <= 1
    with pytest.raises(ValueError, match="one shape and dtype"):
        ours.many([images[0], images[1][:5]])


def test_smaller_tiles_warn_where_nobody_listens(small):
    ours = Upscaler(small, device="cpu", tile=0)
    ours._forward.net = Scarce(ours._forward.net, 400, MemoryError())
    with pytest.warns(RuntimeWarning, match="out of memory on cpu"):
        ours(image(30, 30))


def test_the_package_offers_it_without_importing_it(tmp_path):
    code = (
        "import sys, dlgsanet_arch; assert 'dlgsanet_arch.inference' not in sys.modules; "
        "from dlgsanet_arch import Upscaler, upscale; assert callable(upscale); "
        "assert 'PIL' not in sys.modules or 'basicsr' in sys.modules"
    )
    result = run(["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
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
    # The image and its result in 8 bits, and two rows of tiles in float32.
    bound = 3 * pixels + 3 * height * width + 3 * 4 * 3 * (2 * 256 * 2 * width)
    assert int(done.stdout) < bound + (32 << 20)
    assert int(done.stdout) < 12 * pixels  # the whole result in float32


def test_nothing_is_printed(small, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Upscaler(small, device="cpu", tile=32)(image(40, 40))
    assert capfd.readouterr() == ("", "")
