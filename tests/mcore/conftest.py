"""Prepares the CPU platform before any test file imports Megatron-Core."""

from dcpo_megatron.mcore.platform import prepare, select_platform

prepare(select_platform("cpu"))
