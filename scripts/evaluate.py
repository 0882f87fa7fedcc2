"""`vgen evaluate` as a script, for torchrun: `torchrun --nproc-per-node 8 scripts/evaluate.py samples/ ...`."""

import sys

from vgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
