"""The machine of a run: its device, determinism, gauges, several processes, shared tensors.

Begin with device.py.
"""
