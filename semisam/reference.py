# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
