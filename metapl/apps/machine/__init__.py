"""The machine that the application runs on, and its files.

cores        how many cores this process may use
environment  versions and hardware
memory       too little memory, however it is said
sealed       reading what was written: plain files, their SHA-256, values that fit their types; writing them whole
ownership    one owner of a folder
progress     how many are done, on a terminal
"""
