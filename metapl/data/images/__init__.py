"""Images in files and in memory: folders are listed and checked, files are verified and read."""
