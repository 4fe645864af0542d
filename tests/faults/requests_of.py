"""What the runs of these tests are asked for."""

SINGLE = (
    "objective=uft",
    "data=files",
    *(f"+data.sources.{name}.path={name}.jsonl" for name in ("instruct", "pairs", "binary", "scored")),
    "data.sources.pairs.checker=playground",
    "train.steps=7",
    "reference.mode=cached",
    "model.adapter=lora",
    "model.lora.dropout=0.1",
)
"""One training on every kind of row; dropout, so that the generators matter."""

LOOP = ("experiment=loop",)
"""Several stages, one of which makes rows: conftest.py."""

COLUMN = ("experiment=column",)
"""Two stages, the first of which writes a column: conftest.py."""
