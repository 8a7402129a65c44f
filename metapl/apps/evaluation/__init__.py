"""How a classifier does on pictures that are damaged, or made to mislead it."""
