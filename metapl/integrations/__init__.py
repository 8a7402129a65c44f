"""metapl in the training loops of others: each module is of one package, imported when it is used.

``metapl.integrations.transformers``: the weights of a rater in the loss of ``Trainer``.
"""
