"""The command `dft-prep validate`: `command` is its page, `survey` its work on each unit, `writers` its outputs."""
