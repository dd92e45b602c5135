"""Everything about the distribution; pyproject.toml holds only the tools' settings.

The CPU kernels are compiled here, by the C compiler that Python names (or CC), or where there is
none by Zig's, which pip fetches from its index for the build alone. Where they cannot be built the
package works without them; DLGSANET_KERNELS=0 leaves them out.
"""

import hashlib
import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE = "dlgsanet_arch/cpu/kernels.c"

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


def _builds() -> bool:
    return os.name == "posix" and os.environ.get("DLGSANET_KERNELS") != "0"


def _kernels() -> list[Extension]:
    # By this a checkout notices libraries that were built before its source changed.
    digest = hashlib.sha256((ROOT / SOURCE).read_bytes()).hexdigest()
    variants = VARIANTS.get(platform.machine(), {}) if _builds() else {}
    return [
        Extension(
            f"dlgsanet_arch.cpu._{name}",
            [SOURCE],
            define_macros=[("LANES", str(lanes)), ("SOURCE_DIGEST", f'"{digest}"')],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name, (lanes, flags) in variants.items()
    ]


def _has_compiler() -> bool:
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(shlex.split(command)[0]) is not None


class BuildKernels(build_ext):
    """Builds with Zig's C compiler where there is no other."""

    def build_extensions(self) -> None:
        """Build what there is."""
        if self.extensions and not _has_compiler() and importlib.util.find_spec("ziglang"):
            zig = Path(importlib.util.find_spec("ziglang").origin).with_name("zig")
            cc = [str(zig), "cc"]
            self.compiler.set_executables(
                compiler_so=[*cc, "-fPIC"], linker_so=[*cc, "-shared"], compiler=cc
            )
        super().build_extensions()
        for extension in self.extensions:
            if not Path(self.get_ext_fullpath(extension.name)).exists():
                print(f"{extension.name} was not built: inference on a CPU is slower without")


KERNELS = _kernels()

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
    package_data={"dlgsanet_arch": ["py.typed"]},
    ext_modules=KERNELS,
    cmdclass={"build_ext": BuildKernels},
    setup_requires=["ziglang>=0.13"] if KERNELS and not _has_compiler() else [],
    python_requires=">=3.10",
    # What the network and the command line need. BasicSR and OpenCV are left to the user, who may
    # have either from another source: a git clone, or one of the four wheels that supply cv2.
    install_requires=[
        "torch>=2.4",
        "numpy>=1.23",  # torch warns at each start where it is missing
        "pyyaml>=6.0",
    ],
    extras_require={
        # What basicsr 1.4.2 imports; its own list demands tb-nightly and packages it never imports.
        "train": [
            "lmdb>=1.4",
            "pillow>=10.1",  # not BasicSR but our data tools read pictures with it
            "requests>=2.28",
            "scipy>=1.9,<2",  # it imports scipy.ndimage.filters, which SciPy 2.0 removes
            "setuptools; python_version >= '3.12'",  # it imports distutils
            "tensorboard>=2.11",
            "torchvision>=0.19",
            "tqdm>=4.64",
        ],
    },
    entry_points={"console_scripts": ["dlgsanet = dlgsanet_arch.cli:main"]},
    zip_safe=False,
)
