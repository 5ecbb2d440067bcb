# SPDX-License-Identifier: Apache-2.0
"""From adapters to a mixture of experts: merging, the layout on disk, joining, and the router."""
