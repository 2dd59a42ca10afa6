"""Jobs over files of requests, one a line: read, answered in any order, kept as they come, written in order.

What a line may say is in `requests`, what its answer looks like in `answers`; `answering` runs the model,
`cluster` several of them with Ray, `record` keeps what is finished, and `job` joins these. Knows no flags.
"""
