"""A run on disk.

rows              the rows that it leaves behind, in a file and as curves of TensorBoard
progress          how far it is: a bar on a terminal, elsewhere a line now and then
checkpoint        states that are whole, or are refused by name
checkpoint_parts  the same of several processes, each of which writes its part
generators        the default random number generators, as a checkpoint keeps them
atomic            files that are the old one or the whole new one
ownership         the folder of a fit, and that it has one owner
fingerprints      settings and data as plain values
fields            fields of a frozen value, held against their ranges and choices
sealed            reading what was written: plain files, their SHA-256, values that fit their types
memory            too little memory, however it is said
signals           the signals by which a process is asked to end
"""
