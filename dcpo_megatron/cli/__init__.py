"""The ``dcpo`` command."""
