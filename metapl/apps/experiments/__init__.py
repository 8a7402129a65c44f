"""What runs recipes.

experiment     one recipe by one method, from data to report
rounds         the labels and the selection between the trainings of Noisy Student
labeling       a network's labels of many pictures, written to a store
labels_given   labels for Reduced MPL: of the run's own teacher, or those that a user gives
galleries      the pictures of a report
suspects       the labels that are most likely wrong
settle         values for all that a recipe for own pictures leaves open, by what they show and by how fast steps are
side_by_side   several methods and seeds
equal_cost     methods at equal cost
accuracies     their accuracies, and whether they differ
jobs           runs in processes of their own
shares         whether processes can share the batches of a recipe
summary        what a run reached, in sentences
store          recipes and results on disk
load_run       a finished run
"""
