"""``python -m dcpo_megatron.cli`` is the ``dcpo`` command."""

import sys

from dcpo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
