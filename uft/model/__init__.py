"""Models: loading them, the policy forward that yields log-probs, the reference, and the folder that is left behind."""
