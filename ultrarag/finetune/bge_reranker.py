"""`torchrun -m ultrarag.finetune.bge_reranker ...`: fine-tuning with the adapter 'bge-reranker'."""

import sys

from ultrarag.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(adapter="bge-reranker"))
