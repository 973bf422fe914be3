"""The command `dft-train verify`: two steps in several layouts, compared. `command` is its page."""
