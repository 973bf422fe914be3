"""What both stages agree on: errors, records, the dataset's format, fingerprints, flags, logging.

Imports neither stage, and never torch. The dataset on disk and the command line are the only
things that pass between `dft_prep` and `dft_train`; this package owns the definition of both.
"""

__version__ = "0.1.0"
