"""Run recbole_hatllm from a clone: `python run_hatllm.py --help`. The installed command is `recbole-hatllm`."""

import sys

from recbole_hatllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
