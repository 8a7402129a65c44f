"""metapl in the habits of other packages: each module is of one, imported when it is used.

``metapl.integrations.transformers``: the weights of a rater in the loss of ``Trainer``.
"""
