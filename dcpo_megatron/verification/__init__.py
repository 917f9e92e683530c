"""Proves that a parallel layout computes what one process computes: a dense reference, the real thing on its own ranks,
and the comparison."""
