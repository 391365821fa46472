"""The demonstration behind `make demo`: refresh the model of an index of Python's own documentation as it answers."""
