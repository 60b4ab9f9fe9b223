# SPDX-License-Identifier: Apache-2.0
"""Runs every leak script of this folder in an interpreter of its own; the first leak ends it."""

import subprocess
import sys
from pathlib import Path

for script in sorted(Path(__file__).parent.glob("leak_*.py")):
    done = subprocess.run([sys.executable, str(script)], check=False)
    if done.returncode:
        sys.exit(f"{script.name}: leaks")
    print(f"{script.name}: no leak")
