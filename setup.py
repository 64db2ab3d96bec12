"""Packaging. `mmd2v_kernels` lives in `kernels/`, which is a folder and not an import package: Hugging Face publishes
a package named `kernels` that transformers imports."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "VERSION").read_text().strip()

setup(
    name="mmd2v",
    version=VERSION,
    description="Distil frozen image and text models into one small encoder for both",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["mmd2v", "mmd2v.*"]) + find_packages("kernels"),
    package_dir={"mmd2v": "mmd2v", "mmd2v_kernels": "kernels/mmd2v_kernels"},
    # Loops that ctypes calls. Without a compiler numpy does their work, more slowly.
    ext_modules=[
        Extension(
            "mmd2v_kernels._cpu_scans",
            ["kernels/mmd2v_kernels/cpu_scans.c", "kernels/mmd2v_kernels/int16_products.c"],
            depends=["kernels/mmd2v_kernels/cpu_forms.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ],
    package_data={"mmd2v.report": ["*.yaml"]},
    install_requires=[
        "torch>=2.10",
        # Its image decoding and encoding are announced to move to another package after 0.29.
        "torchvision>=0.25,<0.30",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "timm>=1.0.20",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "pydantic>=2.11",
        "tyro>=1.0",
        "safetensors>=0.5",
        "fsspec>=2024.6",
        "aiohttp>=3.9",
        "tensorboard>=2.18",
        "rich>=13",
        "matplotlib>=3.9",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=11",
        "psutil>=5.9",
        "threadpoolctl>=3.5",
    ],
    extras_require={
        # torch's CUDA builds bring triton themselves; the extra pins it where they do not.
        "gpu": ["triton>=3.6; platform_system == 'Linux'", "xformers>=0.0.35; platform_system == 'Linux'"],
        "mpi": ["mpi4py>=4.0"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mpi4py>=4.0",
            "xformers>=0.0.35; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["mmd2v = mmd2v.cli.main:run"]},
)
