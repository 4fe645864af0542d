"""Where the numbers of a run go: `metrics.jsonl`, `samples.jsonl` and `items.jsonl`, W&B, a console for people."""
