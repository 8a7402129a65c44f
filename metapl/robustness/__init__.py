"""How a classifier does on pictures that are damaged, or made to mislead it.

corruptions  fifteen kinds of damage in five severities each, as in ImageNet-C
attacks      pictures that are moved against the network: FGSM and PGD
errors       corruption errors, and rates of flipped predictions
measure      accuracies on damaged and on attacked pictures
imagenet     ImageNet-A, ImageNet-C and ImageNet-P, from their files
"""
