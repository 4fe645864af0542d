"""Evaluation: the same battery for every objective, and the checks on the first step of a run."""
