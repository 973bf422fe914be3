"""Is this record good? The one answer, given to `validate` and to a build alike.

`examine` asks for all of it; `judgement` begins with the bytes, `plain` is its short way for ordinary records,
`rules` and `tool_rules` find what is odd, `decontaminate` what must not be in training.
"""
