"""Evaluation on held-out rows: the same metrics for every objective."""
