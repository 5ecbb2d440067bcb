# SPDX-License-Identifier: Apache-2.0
"""Label scores, metrics, held-out loss and routing."""
