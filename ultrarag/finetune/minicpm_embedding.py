"""`torchrun -m ultrarag.finetune.minicpm_embedding ...`: fine-tuning with the adapter 'minicpm-embedding'."""

import sys

from ultrarag.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(adapter="minicpm-embedding"))
