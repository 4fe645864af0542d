"""Sampling: completions of prompts, and the job that writes them down as negatives."""
