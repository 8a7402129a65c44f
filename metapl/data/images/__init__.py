"""Images in files and in memory.

``folders`` lists the files of a folder, ``check`` finds copies and other problems, ``verify`` finds unreadable files,
``reader`` reads a file, ``store`` gives images by number, with a ``cache`` and a ``record`` of files that failed.
"""
