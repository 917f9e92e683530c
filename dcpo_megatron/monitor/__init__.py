"""Watching a run: its metrics and where they go, its pages, its heartbeat and watchdog."""
