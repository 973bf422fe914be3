"""Memory-mapped rows and the pack index -> the tensors of a micro-batch: `dataset`, `sampler`, `collate`,
`prefetch`.
"""
