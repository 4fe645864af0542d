"""From files to batches: sources -> rows -> mixture -> batches.

`readers` bring records in, `formats` turn a record into prompt and completions, `sources` makes rows of them and keeps
some for evaluation, `templates` and `tokens` turn rows into token ids with their supervised targets, `mixture` says
which row comes next, `batches` lays rows out as tensors, `report` tells what all of it came to.
"""
