# SPDX-License-Identifier: Apache-2.0
"""What goes to the Hub: repositories and model cards."""
