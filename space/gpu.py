# SPDX-License-Identifier: Apache-2.0
"""What has to be settled before torch is imported: how its threads wait, and on ZeroGPU the package `spaces`.

On ZeroGPU a GPU is lent for the length of a decorated call.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a thread then sleeps: visitors and the web server use the cores too

try:
    from spaces import GPU as on_gpu
except ImportError:  # any other machine

    def on_gpu(function):
        return function
