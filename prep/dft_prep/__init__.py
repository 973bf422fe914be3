"""Stage 1: messy chat files -> conversations -> tokens and assistant masks -> shards and a pack index.

Data flows one way: cli -> recipe -> sources -> units -> readers -> reconcile -> validate -> template ->
encode -> split -> pack -> shards -> build -> report. Never imports torch, transformers or `dft_train`.
"""
