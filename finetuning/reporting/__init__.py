"""Records of runs and their presentation: log lines, statistics, figures, tables, pages, saved models.

Nothing here trains or evaluates a model.
"""
