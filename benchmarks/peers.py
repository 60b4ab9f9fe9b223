# SPDX-License-Identifier: Apache-2.0
"""What people use today for each operator: the functions that `tests/cases.py` names as peers.

Each takes the data of its `Speed` entry. A peer whose package is missing raises ImportError, and the
benchmark says so in its row. "published" peers are written here from the formulas of the methods'
descriptions in the way that training scripts usually write them.
"""

from __future__ import annotations

import torch.nn.functional as F

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits_torch(prob):
    return F.adaptive_avg_pool3d(prob[:, None], (32, 32, 32))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
