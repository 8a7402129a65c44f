"""Known data sets: scikit-learn's digits, and those that torchvision reads."""
