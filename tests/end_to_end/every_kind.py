"""Rows of every kind of feedback, as they stand in JSONL files: unequal lengths, one turn and several."""

from __future__ import annotations

from typing import Any


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [
        {"prompt": "What is the capital of France?", "response": "Paris."},
        {"prompt": "Count to five.", "response": "one two three four five, and that is all there is to count here."},
        {"prompt": "2+2?", "response": "4"},
        {
            "prompt": [
                said("user", "Hi."),
                said("assistant", "Hello, ask me."),
                said("user", "Name a number, please."),
            ],
            "response": "Seven is a number.",
        },
        {"prompt": "Say something long.", "response": "The quick brown fox jumps over the lazy dog. " * 2 + "Done."},
    ],
    "conversations": [
        {
            "messages": [
                said("system", "You are brief."),
                said("user", "What is one plus two?"),
                said("assistant", "three"),
                said("user", "And plus one more, which is what then?"),
                said("assistant", "That makes four."),
            ]
        },
        {"messages": [said("user", "Hello"), said("assistant", "Hello to you, how can I help today?")]},
        {
            "messages": [
                said("user", "again"),
                said("assistant", "again"),
                said("user", "again"),
                said("assistant", "again and again"),
                said("user", "stop"),
                said("assistant", "Stopped."),
            ]
        },
    ],
    "pairs": [
        {"prompt": "Greet me.", "chosen": "Good morning to you!", "rejected": "no"},
        {
            "prompt": "What is 3 minus 1?",
            "chosen": "two",
            "rejected": "It may be three, or four, I do not really know.",
        },
        {"prompt": "Which city?", "chosen": "Paris is the city.", "rejected": "Lyon is the city."},
        {
            "prompt": [said("system", "Be kind."), said("user", "I failed.")],
            "chosen": [said("assistant", "Try again tomorrow.")],
            "rejected": [said("assistant", "Sure you did!")],
        },
    ],
    "labels": [
        {"prompt": "What is 5 plus 4?", "completion": "nine", "label": True},
        {"prompt": "What is 6 plus 1?", "completion": "It is certainly twelve.", "label": False},
        {"prompt": "Capital?", "completion": "The capital is Paris, as all know.", "label": True},
    ],
    "scores": [
        {"prompt": "Describe the sea.", "completion": "Blue, wide and never quite still.", "score": 0.9},
        {"prompt": "Describe the sea.", "completion": "wet", "score": 0.2},
        {"prompt": "Describe the sea.", "completion": "The sea is large.", "score": 0.6},
        {"prompt": "Describe a stone.", "completion": "Hard.", "score": 0.35},
        {"prompt": "Describe a stone.", "completion": "A stone is what remains of a mountain.", "score": 1.0},
    ],
    "negatives": [
        {
            "prompt": "What is 1 plus 1?",
            "response": "two",
            "negatives": ["eleven", "I would say that one plus one is three.", "France"],
            "negative_log_probs": [-41.5, -157.25, -22.0],
        },
        {
            "prompt": "Who wrote it?",
            "response": "Nobody knows who wrote it.",
            "negatives": ["me", "The capital of France wrote it.", "0123456789"],
            "negative_log_probs": [-16.0, -90.5, -20.75],
        },
        {"prompt": "Yes or no?", "response": "yes", "negatives": ["no no no"], "negative_log_probs": [-60.0]},
    ],
}
"""JSONL rows of every kind, of unequal lengths."""
