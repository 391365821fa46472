"""The report of a fine-tuning run: one HTML file that shows what was gained and lost; it knows plain data alone."""
