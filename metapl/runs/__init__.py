"""A run on disk.

folder        the files of one run
checkpoint    states that are whole, or are refused by name
tensorboard   event files
atomic        files that are the old one or the whole new one
locks         exclusive locks on files
"""
