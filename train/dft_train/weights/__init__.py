"""Whole weights out of parts that lie on many ranks: planned, gathered, and written while they are gathered."""
