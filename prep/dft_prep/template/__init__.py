"""Chat templates: a conversation -> the text that inference would see, with the trained stretches.

`sandbox` compiles, `compiled` renders, `trace` tells who printed what, `probes` ask, `learnt` learns, `spans` decide,
`render` does it all.
"""
