"""What holds for all tests: how hypothesis tries."""

from __future__ import annotations

import os

from hypothesis import settings

# The verdict on a change may depend on the change alone: the same cases each time, and no clock. New cases are for
# the nightly run.
settings.register_profile("every-change", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("DFT_HYPOTHESIS", "every-change"))
