"""`python -m dft_train`: the same as the console script `dft-train`; what torchrun and deepspeed start."""

import sys

from dft_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
