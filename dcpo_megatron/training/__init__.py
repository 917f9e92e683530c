"""The training loop, its configuration, metrics and reports."""
