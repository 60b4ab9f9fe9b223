# SPDX-License-Identifier: Apache-2.0
"""Generalists: promptable models that teach a specialist."""

from __future__ import annotations

from semisam.generalists.protocol import Decoded, Generalist, GeneralistSpec

__all__ = ["Decoded", "Generalist", "GeneralistSpec"]
