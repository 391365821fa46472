"""`torchrun -m ultrarag.finetune.bgem3 ...`: fine-tuning with the adapter 'bgem3'."""

import sys

from ultrarag.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(adapter="bgem3"))
