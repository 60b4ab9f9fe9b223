# SPDX-License-Identifier: Apache-2.0
"""`python -m semisam`: see `semisam.cli`."""

import sys

from semisam.cli import main

sys.exit(main())
