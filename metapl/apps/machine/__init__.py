"""The machine that the application runs on, and its files.

cores        how many cores this process may use
environment  versions and hardware
"""
