"""`python -m ultrarag.doors.ultrarag_v3 retriever`: a server over stdio, as the written folders start it."""

import sys

from ultrarag.doors.ultrarag_v3.serving import main

sys.exit(main(sys.argv[1:]))
