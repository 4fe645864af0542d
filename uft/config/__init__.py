"""Configuration: the schema of every group, composition with Hydra, checks that name every problem at once.

The only package that knows Hydra's insides. Nothing here imports torch.
"""
