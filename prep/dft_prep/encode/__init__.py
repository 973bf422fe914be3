"""Rendered text -> token ids and mask, piece by piece (`batch`), by an encoder that is held against another
(`checks`).
"""
