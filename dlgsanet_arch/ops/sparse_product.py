"""The dynamic depthwise convolution on a CPU as a product with a sparse matrix.

With a pixel's channels side by side, the filters of some rows, as their projection leaves them,
are the values of a sparse matrix: one row for each pixel and group, K² entries in it, and columns
that never change. It acts on the input as a matrix of C // G columns. So nothing is transposed,
and MKL keeps a row's sum in registers where a sum over shifted pictures goes through cache K²
times.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from dlgsanet_arch.ops.shifted_taps import backward, forward, projected_backward

__all__ = ["backward", "can_serve", "forward", "projected_backward", "projected_forward"]

# Entries of the sparse matrix at a time: values and column numbers fill 2 MiB each in float32.
ENTRIES = 1 << 19


def can_serve(x: Tensor) -> bool:
    """Return whether MKL is there and knows the dtype of `x`."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )


@functools.lru_cache(maxsize=4)
def _places(rows: int, width: int, groups: int, kernel: int) -> tuple[Tensor, Tensor]:
    """Return where the matrix of `rows` of a picture has entries, in the form of CSR.

    Matrix rows run over rows, columns and groups of the picture; matrix columns over those of the
    picture with a border of K // 2. The first n rows of the picture have the first entries.

    Returns:
        Where each matrix row's entries begin, and the matrix column of each entry; int32.
    """
    y, x, group, i, j = torch.meshgrid(
        *(torch.arange(n, dtype=torch.int32) for n in (rows, width, groups, kernel, kernel)),
        indexing="ij",
    )
    columns = ((y + i) * (width + kernel - 1) + x + j) * groups + group
    begins = torch.arange(0, columns.numel() + 1, kernel**2, dtype=torch.int32)
    with warnings.catch_warnings():
        # PyTorch says once that CSR is in beta; the tests of this file hold it to the definition.
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(begins[:1], columns[:0].flatten(), torch.empty(0), (0, 1))
    return begins, columns.flatten()


def projected_forward(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, kernel: int
) -> Tensor:
    """Compute the convolution; shapes as in `reference.projected_dwconv_reference`.

    Returns:
        (B, C, H, W) in the dtype and layout of `x`.
    """
    channels, height, width = x.shape[1:]
    groups = len(bias) // kernel**2
    border = kernel // 2
    step = max(1, min(height, ENTRIES // max(1, width * len(bias))))
    begins, columns = _places(step, width, groups, kernel)
    out = torch.empty_like(x)
    padded = x.new_empty(height + kernel - 1, width + kernel - 1, channels)
    inner = padded[border : border + height, border : border + width]
    for edge in (padded[:border], padded[border + height :]):
        edge.zero_()
    for edge in (padded[:, :border], padded[:, border + width :]):
        edge.zero_()
    for item, features, target in zip(x, hidden, out, strict=True):
        inner.copy_(item.permute(1, 2, 0))
        target = target.permute(1, 2, 0)
        for start in range(0, height, step):
            stop = min(start + step, height)
            filters = F.linear(features[:, start:stop].permute(1, 2, 0), weight, bias).flatten()
            seen = padded[start : stop + kernel - 1].view(-1, channels // groups)
            size = (filters.numel() // kernel**2, len(seen))
            matrix = torch.sparse_csr_tensor(
                begins[: size[0] + 1], columns[: filters.numel()], filters, size
            )
            rows = target[start:stop]
            if rows.is_contiguous():
                product = rows.view(size[0], -1)
                torch.addmm(product, matrix, seen, beta=0, out=product)
            else:
                rows.copy_((matrix @ seen).view(rows.shape))
    return out
