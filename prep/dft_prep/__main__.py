"""`python -m dft_prep`: the same as the console script `dft-prep`."""

import sys

from dft_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
