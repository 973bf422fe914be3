"""Rows -> the dataset's files: a unit's `parts`, the side of the `split`, the shards (`writer`), the index of packs
(`pack`).
"""
