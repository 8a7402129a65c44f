"""A run on disk.

folder        the files of one run
metrics       the rows that it leaves behind
checkpoint    states that are whole, or are refused by name
generators    the default random number generators, as a checkpoint keeps them
environment   versions and hardware
tensorboard   event files
atomic        files that are the old one or the whole new one
locks         exclusive locks on files
ownership     one owner per folder
"""
