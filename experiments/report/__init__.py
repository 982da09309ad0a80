"""`python -m experiments.report`: one page of runs of the store, with their captions beside one another and where on
the picture each word came from.
"""
