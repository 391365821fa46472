"""`torchrun -m ultrarag.finetune.bge ...`: fine-tuning with the adapter 'bge'."""

import sys

from ultrarag.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(adapter="bge"))
