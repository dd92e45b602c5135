"""The dynamic convolution as published code computes it: a map of filters, and naive kernels.

One thread makes one value, in float32, reading all it needs from global memory. The kernels are
compiled by NVRTC, through CuPy, with all sizes as constants. A baseline for benchmarks alone.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

THREADS = 256

# B, C, G, H, W and K are compiled in. Maps are (B, C, H, W) and (B, G, K, K, H, W), contiguous.
SOURCE = r"""
// Sums over the taps: those around a value, or, with a sign of -1, those that it is a tap of.
__device__ void gather(const float* x, const float* filters, float* out, int sign) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= B * C * H * W) return;
    int column = index % W;
    int row = index / W % H;
    int channel = index / (W * H) % C;
    int item = index / (W * H * C);
    int group = channel / (C / G);
    float total = 0;
    for (int i = 0; i < K; i++) {
        for (int j = 0; j < K; j++) {
            int r = row + sign * (i - K / 2);
            int c = column + sign * (j - K / 2);
            if (r < 0 || r >= H || c < 0 || c >= W) continue;
            int centre = sign > 0 ? row * W + column : r * W + c;
            total += filters[(((item * G + group) * K + i) * K + j) * H * W + centre]
                * x[((item * C + channel) * H + r) * W + c];
        }
    }
    out[index] = total;
}

extern "C" __global__ void convolve(const float* x, const float* filters, float* out) {
    gather(x, filters, out, 1);
}

extern "C" __global__ void gradient_of_x(const float* grad, const float* filters, float* out) {
    gather(grad, filters, out, -1);
}

extern "C" __global__ void gradient_of_filters(const float* grad, const float* x, float* out) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= B * G * K * K * H * W) return;
    int column = index % W;
    int row = index / W % H;
    int j = index / (W * H) % K;
    int i = index / (W * H * K) % K;
    int group = index / (W * H * K * K) % G;
    int item = index / (W * H * K * K * G);
    int r = row + i - K / 2;
    int c = column + j - K / 2;
    float total = 0;
    if (r >= 0 && r < H && c >= 0 && c < W) {
        for (int channel = group * (C / G); channel < (group + 1) * (C / G); channel++) {
            total += grad[((item * C + channel) * H + row) * W + column]
                * x[((item * C + channel) * H + r) * W + c];
        }
    }
    out[index] = total;
}
"""


def why_not(device: str) -> str:
    """Say why these kernels cannot run on `device`, or return an empty text where they can."""
    if device != "cuda":
        return "its kernels are for GPUs"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy, which compiles its kernels, is not installed"
    return ""


def macros(x_shape: Sequence[int], filters_shape: Sequence[int]) -> tuple[str, ...]:
    """Return the compiler's options that make the sizes constants."""
    batch, channels, height, width = x_shape
    sizes = {
        "B": batch,
        "C": channels,
        "G": filters_shape[1],
        "H": height,
        "W": width,
        "K": filters_shape[2],
    }
    return tuple(f"-D{name}={size}" for name, size in sizes.items())


@functools.cache
def _kernel(name: str, options: tuple[str, ...]) -> Any:
    import cupy

    return cupy.RawKernel(SOURCE, name, options=options)


def _launch(name: str, a: Tensor, b: Tensor, out: Tensor, options: tuple[str, ...]) -> None:
    """Run a kernel on PyTorch's current stream."""
    import cupy

    if out.numel() >= 2**31:
        raise ValueError(f"the naive kernels count in 32 bits; got {out.numel()} values")
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(out.device).cuda_stream)
    blocks = -(-out.numel() // THREADS)
    with cupy.cuda.Device(out.device.index or 0), stream:
        pointers = tuple(each.data_ptr() for each in (a, b, out))
        _kernel(name, options)((blocks,), (THREADS,), pointers)


class _Naive(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        x, filters = x.float().contiguous(), filters.float().contiguous()
        ctx.save_for_backward(x, filters)
        out = torch.empty_like(x)
        _launch("convolve", x, filters, out, macros(x.shape, filters.shape))
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, filters = ctx.saved_tensors
        grad = grad.contiguous()
        options = macros(x.shape, filters.shape)
        grad_x, grad_filters = torch.empty_like(x), torch.empty_like(filters)
        _launch("gradient_of_x", grad, filters, grad_x, options)
        _launch("gradient_of_filters", grad, x, grad_filters, options)
        return grad_x, grad_filters


def dynamic_dwconv_naive(x: Tensor, filters: Tensor) -> Tensor:
    """Compute the convolution in float32; shapes as in `ops.dynamic_dwconv`."""
    return _Naive.apply(x, filters)
