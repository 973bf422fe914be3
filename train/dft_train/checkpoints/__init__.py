"""Checkpoints: what a `whole` one is, `saving` one on all ranks, `resume`, and going on with other ranks
(`reshard`).
"""
