"""uft: unified fine-tuning of language models, one stage, any objective, side by side."""

__version__ = "0.1.0"
