# SPDX-License-Identifier: Apache-2.0
"""What a run reads: the data directory, its tasks, leaks between files, datasets on the Hub, and the sample data."""
