"""Answers to benchmarks, judged: within a run, or of a model's folder."""
