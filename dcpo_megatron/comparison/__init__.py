"""Comparing methods on equal terms: the plan, its starts, what its runs measured, statistics over seeds, the paper's
claims, the report."""
