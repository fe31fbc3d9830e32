"""`python -m deploy`. See deploy/cli.py."""

import os

# The reference backend multiplies many small matrices; on a busy machine a threaded BLAS spends far longer waiting for
# its own threads than computing (seen: 16 times). Set before numpy loads; an explicit setting wins.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from deploy.cli import main

if __name__ == "__main__":
    main()
