# SPDX-License-Identifier: Apache-2.0
"""What the recipes and scripts of FinTeamExperts share: roles, data, tasks, models, routing and run folders."""
