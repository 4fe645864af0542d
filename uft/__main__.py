"""`python -m uft` is `uft`."""

import sys

from uft.cli import main

if __name__ == "__main__":
    sys.exit(main())
