# SPDX-License-Identifier: Apache-2.0
"""Sample data: real series from statsmodels and arch, fictional companies whose statements add up, labels computed."""
