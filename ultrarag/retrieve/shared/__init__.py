"""A live index that many processes share through a vector server (docs/shared-index.md).

The server holds the passages with their place in the write log, the vectors of each generation, and who may write.
Every process keeps a mirror of the passages in a directory of its own, and answers from it and the server.
"""
