"""Repair what a killed DVC leaves torn.

Begin with heal.py.
"""
