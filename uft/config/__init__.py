"""Configuration: from a request (:mod:`uft.config.compose`) to settings that are valid, and the frozen file of a run.

`schema` has every key, those of objectives too; `files` reads what Hydra draws in, and the words of the command line;
`checks` has the rules between keys and judges the whole, `messages` its words; `stages` and `frozen` read what came of
it. Nothing here imports torch.
"""
