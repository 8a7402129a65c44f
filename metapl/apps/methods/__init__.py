"""The methods by which networks are trained, one a file."""
