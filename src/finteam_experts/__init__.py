# SPDX-License-Identifier: Apache-2.0
"""The library behind the recipes and scripts of FinTeamExperts."""
