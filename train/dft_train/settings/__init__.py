"""What the user asked for: `arguments`, what they become for transformers, and the refusals before a model is
loaded.
"""
