"""A run on disk.

folder            the files of one run
rows              the rows that it leaves behind
checkpoint        states that are whole, or are refused by name
checkpoint_parts  states of which every process writes its part
generators        the default random number generators, as a checkpoint keeps them
environment       versions and hardware
tensorboard       event files
atomic            files that are the old one or the whole new one
locks             exclusive locks on files
ownership         one owner per folder
fingerprints      settings and data as plain values
typed             values from a file, held against their types
fields            fields of a frozen value, held against their ranges and choices
plain_files       reading plain files alone
cores             how many cores this process may use
memory            too little memory, however it is said
signals           the signals by which a process is asked to end
"""
