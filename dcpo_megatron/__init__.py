"""DCPO (Dynamic Clipping Policy Optimization, arXiv 2509.02333) on Megatron-Core."""

__version__ = "0.1.0"
