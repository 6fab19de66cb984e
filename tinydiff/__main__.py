"""`python -m tinydiff` is the command `tinydiff`."""

import sys

from tinydiff.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
