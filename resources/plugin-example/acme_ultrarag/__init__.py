"""Two encoders and two extensions for ultrarag, as an example of a plugin."""
