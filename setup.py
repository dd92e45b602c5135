"""Everything about the distribution; pyproject.toml holds only the tools' settings."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

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
