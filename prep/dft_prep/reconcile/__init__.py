"""A parsed record of any format in the wild -> one canonical conversation.

`record` is the way in; `formats` has a file a format, over the small readers in `converters`; `reading` is what a
recipe says of a source, `fields` and `reconciliation` count and show what was found and what became of it.
"""
