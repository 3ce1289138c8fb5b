"""One structured self-attention call inside a model: when it runs, with which options, and what it cost."""
