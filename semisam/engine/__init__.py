# SPDX-License-Identifier: Apache-2.0
"""From files to results: data, training, inference, evaluation, report."""
