"""What runs recipes.

experiment   one recipe by one method, from data to report
comparison   several methods and seeds, and whether they differ
budget       how many steps fit into a time
galleries    the pictures of a report
reports      the reports of comparisons
store        recipes and results on disk
load_run     a finished run
"""
