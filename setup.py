"""Packaging. Exact versions that were tried stand in requirements/*.txt; here are the ranges that the code is written
for."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "dcpo_megatron" / "__init__.py").read_text())[1]

setup(
    name="dcpo-megatron",
    version=VERSION,
    description="DCPO (Dynamic Clipping Policy Optimization) on Megatron-Core, fed by SGLang",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dcpo_megatron", "dcpo_megatron.*"]),
    package_data={"dcpo_megatron": ["py.typed", "config/recipes/**/*.yaml", "monitor/templates/*.html"]},
    install_requires=[
        "torch>=2.6",
        'megatron-core>=0.16,<0.17; python_version < "3.12"',
        'megatron-core>=0.16,<0.20; python_version >= "3.12"',
        "einops>=0.8",
        "transformers>=5.0",
        "safetensors>=0.5",
        "httpx>=0.27",
        "psutil>=5.9",
        "numpy>=1.26",
        "pyarrow>=15",
        "pydantic>=2.6",
        "PyYAML>=6.0",
        "jinja2>=3.1",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboard>=2.15",
        "math-verify>=0.8",
        "mpmath>=1.3",
        "nvidia-ml-py>=12.535",
    ],
    extras_require={
        # The server lives in an environment of its own; see requirements/sglang.txt.
        "sglang": ["sglang>=0.5.20"],
        "wandb": ["wandb>=0.17"],
        # No extra has Transformer Engine: pip would build it apart, against the newest torch and not the installed one.
        # docs/installation.md has the commands. NVIDIA Apex installs from source only; PyPI's `apex` is another project
        # and must not be installed.
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "import-linter>=2.0", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["dcpo = dcpo_megatron.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "License :: OSI Approved :: Apache Software License",
        "Typing :: Typed",
    ],
)
