"""The demonstration behind `make demo`: fine-tune a small model on Python's own documentation."""
