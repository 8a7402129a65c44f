"""What runs recipes.

experiment     one recipe by one method, from data to report
methods        training by each method
settle         values for all that a recipe for own pictures leaves open
looking        what a few pictures show of a data set
budget         how many steps fit into a time
side_by_side   several methods and seeds
accuracies     their accuracies, and whether they differ
jobs           runs in processes of their own
galleries      the pictures of a report
labeling       a network's labels of many pictures, written to a store
labels_given   labels for Reduced MPL that a user gives
reducing       Reduced MPL
fits           fits of one network, and finetuning
noisy_labels   training on labels that may be wrong
noisy_student  training by Noisy Student
rounds         the labels and the selection between its trainings
noisy_teacher  a teacher that labels with noise
larger         finetuning at a larger resolution
equal_cost     methods at equal cost
shares         whether processes can share the batches of a recipe
summary        what a run reached, in sentences
suspects       the labels that are most likely wrong
store          recipes and results on disk
load_run       a finished run
"""
