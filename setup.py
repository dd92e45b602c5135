"""Everything about the distribution; pyproject.toml holds only the tools' settings.

The CPU kernels are compiled here, by the first C compiler that works, or where there is none by
Zig's, which pip fetches for the build alone: that is why this file is also the build backend that
pyproject.toml names, setuptools' own and that one requirement more. Where they cannot be built the
package is installed without them; DLGSANET_KERNELS=0 leaves them out.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta, find_packages, setup
from setuptools.build_meta import (  # noqa: F401 - the rest of the build backend
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The C library: its header first, then what is compiled; as in dlgsanet_arch/cpu/library.py.
C_FILES = [
    f"dlgsanet_arch/cpu/{name}"
    for name in ("common.h", "dynamic.c", "layers.c", "operators.c", "work.c")
]
ZIG = "ziglang>=0.16"  # older ones refuse to return the vectors of AVX-512

# Variants of the kernels by processor, as dlgsanet_arch/cpu/library.py chooses among them: the
# floats of a vector, and the flags for the instructions that PyTorch's name of each stands for.
X86 = {
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (
        16,
        [
            *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
            "-mprefer-vector-width=512",
        ],
    ),
}
ARM = {"neon": (4, [])}
VARIANTS = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}
# Nobody looks at floating-point flags: comparisons may then become vectors.
FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=fast"]

EXTRAS = {
    # What basicsr 1.4.2 imports; its own list demands tb-nightly and what it never imports.
    "train": [
        "lmdb>=1.4",
        "pillow>=10.1",  # not BasicSR but our data tools read images with it
        "requests>=2.28",
        "scipy>=1.9,<2",  # it imports scipy.ndimage.filters, which SciPy 2.0 removes
        "setuptools; python_version >= '3.12'",  # it imports distutils
        "tensorboard>=2.11",
        "torchvision>=0.19",
        "tqdm>=4.64",
    ],
    # What `dlgsanet export` imports, and what dlgsanet_arch.spandrel adds itself to.
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "spandrel>=0.4"],
    "hub": ["huggingface-hub>=0.25"],
    # What `dlgsanet upscale` and the other tools import; OpenCV only for 16-bit colour.
    "tools": [
        "matplotlib>=3.6",
        "pillow>=10.1",
        "psutil>=5.9",  # free memory on macOS and Windows
        "tifffile>=2022.8",  # 16-bit TIFF files out
        "tqdm>=4.64",
    ],
}


def variants() -> dict[str, tuple[int, list[str]]]:
    """Return the kernels to build on this machine: vectors and flags by name."""
    if os.name != "posix" or os.environ.get("DLGSANET_KERNELS") == "0":
        return {}
    return VARIANTS.get(platform.machine(), {})


def _extensions() -> list[Extension]:
    # By this a checkout notices libraries that were built before its source changed.
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in C_FILES)).hexdigest()
    return [
        Extension(
            f"dlgsanet_arch.cpu._{name}",
            C_FILES[1:],
            depends=C_FILES[:1],
            define_macros=[("LANES", str(lanes)), ("SOURCE_DIGEST", f'"{digest}"')],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, (lanes, flags) in variants().items()
    ]


def _works(command: list[str]) -> bool:
    """Return whether a C compiler, its headers and its linker can build every variant."""
    with tempfile.TemporaryDirectory() as folder:
        for lanes, flags in variants().values():
            macros = [f"-DLANES={lanes}", '-DSOURCE_DIGEST=""']
            quickly = [*FLAGS, *flags, "-O0", "-w", "-fPIC", "-shared"]
            files = [*(str(ROOT / name) for name in C_FILES[1:])]
            files += ["-o", str(Path(folder, "kernels.so"))]
            try:
                subprocess.run(
                    [*command, *macros, *quickly, *files], check=True, capture_output=True
                )
            except (OSError, subprocess.CalledProcessError):
                return False
    return True


@functools.cache
def find_compiler() -> tuple[str, ...] | None:
    """Return the command of the first C compiler that works: CC, Python's own, the usual names."""
    named = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for command in dict.fromkeys(tuple(shlex.split(name)) for name in named if name):
        if command and _works([*command]):
            return command
    return None


def find_zig() -> tuple[str, ...] | None:
    """Return the command of Zig's C compiler, None where the package ziglang is not installed.

    By itself it compiles for the very processor it runs on, which a variant must not depend on.
    """
    if importlib.util.find_spec("ziglang") is None:
        return None
    return (sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline")


def _is_offered(name: str) -> bool:
    """Return False where pip says that there is no such package, so that the rest installs.

    A build environment has no pip of its own: isolated (-I), Python finds that of the environment
    it was made from. Where there is none, as under uv, the package is asked for all the same.
    """
    pip = [sys.executable, "-I", "-m", "pip", "--no-input", "--disable-pip-version-check"]
    look = [*pip, "--retries=1", "index", "versions", name]
    found = subprocess.run(look, capture_output=True, text=True)
    return "No matching distribution" not in found.stderr


def needs_zig() -> bool:
    """Return whether there are kernels to build and no C compiler for them."""
    return bool(variants()) and find_compiler() is None


def _zig_if_needed() -> list[str]:
    return [ZIG] if needs_zig() and _is_offered("ziglang") else []


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what the build of a wheel needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_zig_if_needed()]


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return what an editable install needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_zig_if_needed()]


class BuildKernels(build_ext):
    """Builds the kernels with any C compiler, or leaves them out.

    They are not modules of Python's: the compiler and the flags that Python was built with, which
    may name what only that machine had, do not matter to them.
    """

    def build_extensions(self) -> None:
        """Build every variant anew, as changed flags go unnoticed; keep those that were built."""
        command = find_compiler() or find_zig()
        if command is None:
            self.warn("no C compiler works here: inference on a CPU is slower without the kernels")
        else:
            self.force = True
            self.compiler.set_executables(
                compiler_so=[*command, "-fPIC"], linker_so=[*command, "-shared"]
            )
            with tempfile.TemporaryDirectory() as folder:  # else 90 MB stay in the user's home
                os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = folder
                super().build_extensions()
        # setuptools before 65 copies an optional library into a checkout without looking for it.
        self.extensions = [
            each for each in self.extensions if Path(self.get_ext_fullpath(each.name)).exists()
        ]


class BuildPackage(build_py):
    """Builds the package with the option files in it, which a checkout has beside it."""

    def run(self) -> None:
        """Copy the package, and the option files to where options/shipped.py looks in it."""
        super().run()
        for source, target in self._option_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the paths of all that is built."""
        return [*super().get_outputs(include_bytecode), *self._option_files().values()]

    def _option_files(self) -> dict[str, str]:
        if self.editable_mode:  # then the checkout's are found
            return {}
        files = sorted((ROOT / "options").glob("*/*.yml"))
        inside = Path(self.build_lib, "dlgsanet_arch", "option_files")
        return {str(file): str(inside / file.relative_to(ROOT / "options")) for file in files}


if __name__ == "__main__":  # as setuptools runs it, not as a backend
    setup(
        name="dlgsanet-arch",
        # Run alone: importing the package would need torch where only setuptools is.
        version=runpy.run_path(str(ROOT / "dlgsanet_arch" / "version.py"))["__version__"],
        description="DLGSANet (ICCV 2023), lightweight image super-resolution, as a BasicSR plugin",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        keywords=["super-resolution", "image-restoration", "DLGSANet", "BasicSR"],
        classifiers=[
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Image Processing",
        ],
        packages=find_packages(include=["dlgsanet_arch", "dlgsanet_arch.*"]),
        package_data={
            "dlgsanet_arch": ["py.typed", "weights/*.safetensors", "tools/*/*.yml", "tools/*/*.py"]
        },
        ext_modules=_extensions(),
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
        python_requires=">=3.10",
        # What the network and the command line need. BasicSR and OpenCV are left to the user, who
        # may have either from another source: a git clone, or one of the four wheels with cv2.
        install_requires=[
            "torch>=2.5",
            "numpy>=1.23",  # torch warns at each start where it is missing
            "pyyaml>=6.0",
            "safetensors>=0.4",  # the bundled weights
        ],
        extras_require={
            **EXTRAS,
            "all": sorted({each for extra in EXTRAS.values() for each in extra}),
        },
        entry_points={"console_scripts": ["dlgsanet = dlgsanet_arch.cli:main"]},
        zip_safe=False,
    )
