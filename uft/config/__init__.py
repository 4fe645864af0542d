"""Configuration: from a request (:mod:`uft.config.compose`) to settings that are valid, and the frozen file of a run.

`schema` has every key, `rules` what holds between keys, `objectives` the hyper-parameters. `files` reads what Hydra
draws in, `words` the command line; `tree` lays both one over the other and judges the whole, `staged` does so for every
stage of a request; `stages` and `frozen` read what came of it. Nothing here imports torch.
"""
