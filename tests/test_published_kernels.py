"""The naive kernels of the published code, compiled for the CPU, and on a GPU."""

import contextlib
import ctypes
import shutil
import subprocess
import sys
import types

import contestants
import measuring
import published_kernels
import pytest
import torch

from dlgsanet_arch.ops.reference import dynamic_dwconv_reference


@pytest.fixture(scope="module")
def compile_kernels(tmp_path_factory):
    """Compile the naive CUDA kernels for the CPU: a thread after the other."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler stands in for a GPU's")
    folder = tmp_path_factory.mktemp("kernels")

    def compiled(name, options):
        source = folder / "kernels.cpp"
        source.write_text(
            "#define __global__\n"
            "#define __device__ static\n"
            "struct Place { unsigned x; };\n"
            "static Place blockIdx, blockDim, threadIdx;\n"
            f"{published_kernels.SOURCE}\n"
            'extern "C" void run(const float* a, const float* b, float* out, unsigned blocks) {\n'
            f"    blockDim.x = {published_kernels.THREADS};\n"
            "    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)\n"
            "        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)\n"
            f"            {name}(a, b, out);\n"
            "}\n"
        )
        library = folder / f"{name}{'_'.join(options)}.so"
        command = [compiler, "-shared", "-fPIC", *options, str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library)).run

    return compiled


@pytest.fixture
def naive_on_cpu(compile_kernels, monkeypatch):
    """Let what stands in for CuPy run the kernels on this CPU."""
    cupy = types.ModuleType("cupy")

    class RawKernel:
        def __init__(self, code, name, options):
            assert code is published_kernels.SOURCE
            self.run = compile_kernels(name, options)

        def __call__(self, grid, block, pointers):
            assert block == (published_kernels.THREADS,)
            self.run(*map(ctypes.c_void_p, pointers), ctypes.c_uint(grid[0]))

    context = contextlib.nullcontext
    cupy.cuda = types.SimpleNamespace(ExternalStream=context, Device=context)
    cupy.RawKernel = RawKernel
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    published_kernels._kernel.cache_clear()
    yield
    published_kernels._kernel.cache_clear()


def check_naive(device):
    x = torch.randn(2, 6, 5, 9, device=device)
    filters = torch.randn(2, 3, 5, 5, 5, 9, device=device)
    grad = torch.randn_like(x)
    outcomes = []
    for function in (published_kernels.dynamic_dwconv_naive, dynamic_dwconv_reference):
        inputs = x.clone().requires_grad_(), filters.clone().requires_grad_()
        out = function(*inputs)
        outcomes.append((out, *torch.autograd.grad(out, inputs, grad)))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-5)


def test_naive_kernels(naive_on_cpu):
    check_naive("cpu")


@pytest.mark.gpu
def test_naive_kernels_on_cuda():
    pytest.importorskip("cupy")
    check_naive("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_published_style_on_cuda(training):
    pytest.importorskip("cupy")
    net = contestants.build("ours", "tiny", 4).train(training).cuda()
    plain = contestants.build("published-style", "tiny", 4).train(training).cuda()
    x = torch.rand(1, 3, 60, 70, device="cuda")
    with torch.no_grad(), measuring.numerics("fp32", "cuda"):
        torch.testing.assert_close(plain(x), net(x), atol=1e-4, rtol=1e-4)
