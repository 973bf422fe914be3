"""A build: all the other rooms in order, on one process or many, which may be killed at any time. `build` is its
page.
"""
