# SPDX-License-Identifier: Apache-2.0
"""LoRA training with TRL: arguments, checkpoints, experts as linear layers, speed on a CPU, and planning."""
