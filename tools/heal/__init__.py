"""What a killed DVC leaves torn, mended.

Begin with heal.py.
"""
