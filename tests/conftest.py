"""Tests see neither a user's folders nor the repository whose hook runs them."""

import os

for name in ("SCRATCH", "DATA", "KEEP_CHECKPOINTS"):
    os.environ.pop(f"FOCALCAL_{name}", None)
for name in ("DIR", "WORK_TREE", "INDEX_FILE"):
    os.environ.pop(f"GIT_{name}", None)
