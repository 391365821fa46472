"""Doors: the library inside the frameworks that people already use, a room for each.

A framework's own calls come in; calls of `ultrarag.retrieve` and `ultrarag.encoder` go out. Each room needs its
framework, which is an extra of the same name (docs/doors.md); none is imported before its door is named.
Haystack's door lies in `haystack_integrations`, beside this package: it loads components from that namespace alone.
"""
