# SPDX-License-Identifier: Apache-2.0
"""On ZeroGPU a GPU is lent for the length of a decorated call; `spaces` has to be imported before torch is."""

try:
    from spaces import GPU as on_gpu
except ImportError:  # any other machine

    def on_gpu(function):
        return function
