"""Transformer Engine's own Python over a stand-in for its C extension, on a machine without a GPU. For tests only.

This folder goes on the import path together with an unpacked wheel of ``transformer_engine`` (PyPI, nothing but Python
in it). All modules of the package are that wheel's; only this opening is ours, in place of the wheel's own, which would
load CUDA's libraries:

    transformer_engine               this file: where torch asks for a GPU's properties, those of an H100 are given
    transformer_engine.pytorch ...   the wheel's, unchanged
    transformer_engine_torch         the stand-in beside this folder: plain torch formulas for the kernels that are
                                     called

Left out is the export to ONNX, whose packages nothing here needs.
"""

import os
import pkgutil
import sys
from importlib import metadata
from unittest.mock import MagicMock

__path__ = pkgutil.extend_path(__path__, __name__)
__version__ = metadata.version("transformer_engine")

os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common then loads no library of CUDA's

# ruff: noqa: E402, F401, I001
import transformer_engine_torch
from transformer_engine import common

common.load_framework_extension = lambda framework: None
transformer_engine_torch.stand_for_gpu()
sys.modules["transformer_engine.pytorch.onnx_extensions"] = MagicMock()
del os.environ["NVTE_PROJECT_BUILDING"]

from transformer_engine import pytorch
