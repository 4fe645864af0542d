"""The embedded default: a small verifiable world of word tasks and a small real model that knows half of them."""
