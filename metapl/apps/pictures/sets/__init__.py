"""Known data sets: scikit-learn's ``digits``, and ``torchvision_sets`` with the splits of the paper."""
