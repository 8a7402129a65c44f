"""What runs recipes.

folder         a run on disk: its files, its recipe and result, and a run that has ended
experiment     one recipe by one method, from data to report; whether processes can share it
rounds         the labels and the selection between the trainings of Noisy Student
labeling       a network's labels of many pictures, written to a store; those that Reduced MPL takes
page           the page of a run, and the mistakes that it shows
suspects       the labels that are most likely wrong
settle         values for all that a recipe for own pictures leaves open, by what they show and by how fast steps are
side_by_side   several methods and seeds
accuracies     what runs reached, in sentences, and whether methods differ
jobs           runs in processes of their own
"""
