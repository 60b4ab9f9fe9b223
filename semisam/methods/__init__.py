# SPDX-License-Identifier: Apache-2.0
"""Training methods, one small object each."""
