"""What the user named -> raw records, each with its place. No schema is inferred, nothing is parsed.

In order: `named`, `sniff`, `files`, `units`, then `readers` with `json_stream` and `parquet`.
"""
