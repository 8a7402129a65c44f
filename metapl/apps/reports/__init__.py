"""What a run leaves to look at: a web page, and a picture of its curves and confusion."""
